"""What files say of a base's prediction type, and the schedules that follow."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from make_bases import make_base, save_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_sd.base_files import open_base
from lora_sd.base_files.configs import METADATA_KEY
from lora_sd.base_files.metadata import checkpoint_metadata
from lora_sd.base_files.prediction import Prediction, find_prediction
from lora_sd.base_files.scheduler import make_scheduler
from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError
from lora_sd.known_bases import published_configs
from lora_sd.objective import prediction_target

V, EPSILON = "v_prediction", "epsilon"


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The tensors of a miniature as a single file of a published family would have them."""
    folder = make_base("sdxl", tmp_path_factory.mktemp("base") / "base")
    return load_file(save_single_file(folder, folder.parent / "one.safetensors"))


@pytest.fixture
def opened(bare, tmp_path, monkeypatch):
    """Opens the miniature with other tensors and metadata, as if it were of a family."""

    def open_as(family="sdxl", metadata=None, **tensors):
        save_file(bare | tensors, tmp_path / "model.safetensors", metadata)
        files = open_base(str(tmp_path / "model.safetensors"))
        files.__dict__["family"] = family
        return files

    return open_as


def test_markers_of_sdxl_s_fine_tunes(opened):
    marker = torch.zeros(0)
    assert find_prediction(opened()) == Prediction(EPSILON, True, False)
    assert find_prediction(opened(v_pred=marker)) == Prediction(V, True, False)
    assert find_prediction(opened(v_pred=marker, ztsnr=marker)) == Prediction(V, True, True)


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"modelspec.prediction_type": "v"}, Prediction(V, True, False)),
        ({"modelspec.prediction_type": "epsilon"}, Prediction(EPSILON, True, False)),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, Prediction(V, True, False)),
        ({"ss_base_model_version": "sd_v2_768_v"}, Prediction(V, True, False)),
        ({"ss_v_parameterization": "True"}, Prediction(V, True, False)),
        ({"ss_v_parameterization": "true"}, Prediction(V, True, False)),
        ({"ss_v_parameterization": "False"}, Prediction(EPSILON, True, False)),
        ({"ss_v_parameterization": "None"}, Prediction(EPSILON, False, False)),
        (
            {"modelspec.prediction_type": "v", "ss_v_parameterization": "False"},
            Prediction(V, True, False),
        ),
        (
            {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
            Prediction(V, True, True),
        ),
        ({}, Prediction(EPSILON, False, False)),
    ],
)
def test_metadata_of_a_single_file(opened, metadata, expected):
    assert find_prediction(opened("sd21", metadata)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("model: {params: {parameterization: v}}", V),
        ('model:\n  params:\n    parameterization: "v"', V),
        ("model: {params: {timesteps: 1000}}", EPSILON),
    ],
)
def test_the_yaml_beside_a_file(opened, tmp_path, text, expected):
    (tmp_path / "model.yaml").write_text(text)
    assert find_prediction(opened("sd21")) == Prediction(expected, True, False)


@pytest.mark.parametrize("text", ["a: b", "[", "model: {params: {parameterization: x0}}", "1"])
def test_a_strange_yaml_beside_a_file_is_refused(opened, tmp_path, text):
    (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(BaseModelError, match="model.yaml"):
        find_prediction(opened("sd21"))


def test_what_is_asked_wins(opened):
    files = opened(v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    assert find_prediction(files, V, "no") == Prediction(V, True, False)
    assert find_prediction(files, EPSILON, "no") == Prediction(EPSILON, True, False)
    assert find_prediction(opened("sd21"), "auto", "yes") == Prediction(V, True, True)


def test_noise_cannot_be_predicted_at_zero_terminal_snr(opened):
    with pytest.raises(BaseModelError, match="zero terminal SNR.*v_prediction"):
        find_prediction(opened(), EPSILON, "yes")
    with pytest.raises(BaseModelError, match="zero terminal SNR"):
        find_prediction(opened(v_pred=torch.zeros(0), ztsnr=torch.zeros(0)), EPSILON)


def test_a_model_that_predicts_something_else_is_refused(opened):
    with pytest.raises(BaseModelError, match="predicts 'sample'"):
        find_prediction(opened(metadata={"modelspec.prediction_type": "sample"}))


def test_a_bake_says_no_more_than_its_base(opened):
    assert "modelspec.prediction_type" not in checkpoint_metadata(opened("sd21"), "a", [])
    said = checkpoint_metadata(opened("sd21", {"modelspec.prediction_type": "v"}), "a", [])
    assert said["modelspec.prediction_type"] == "v"


def test_a_published_model_s_single_file_carries_no_configs(tmp_path, bare):
    """Only a model that is built otherwise needs them."""
    folder = tmp_path / "model"
    for component, config in published_configs("sdxl").items():
        (folder / component).mkdir(parents=True)
        name = "scheduler_config.json" if component == "scheduler" else "config.json"
        (folder / component / name).write_text(json.dumps({**config, "_name_or_path": "x"}))
    files = open_base(str(make_base("sdxl", tmp_path / "other")))
    assert METADATA_KEY in checkpoint_metadata(files, "a", [])
    files.path, files.__dict__["family"] = folder, "sdxl"
    assert METADATA_KEY not in checkpoint_metadata(files, "a", [])
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    assert METADATA_KEY in checkpoint_metadata(files, "a", [])


# --- schedules ---


# diffusers' Euler scheduler asks numpy 2 for an array of a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("zero", [False, True])
def test_schedulers_of_the_published_families(family, zero):
    config = published_configs(family)["scheduler"]
    scheduler = make_scheduler("x", config, V, zero)
    kinds = {"sd15": PNDMScheduler, "sd21": DDIMScheduler, "sdxl": EulerDiscreteScheduler}
    kind = DDIMScheduler if zero and family == "sd15" else kinds[family]
    assert type(scheduler) is kind and scheduler.config.prediction_type == V
    scheduler.set_timesteps(10)
    assert (scheduler.timesteps[0] == 999) == zero


def test_the_last_timestep_is_pure_noise_and_its_velocity_the_picture(tmp_path):
    base = load_base_model(
        str(make_base("sdxl", tmp_path / "base", predicts_v=True)),
        torch.device("cpu"),
        torch.float32,
    )
    schedule = base.noise_schedule()
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    last = torch.tensor([999])
    assert torch.equal(schedule.add_noise(latents, noise, last), noise)
    assert torch.equal(prediction_target(schedule, latents, noise, last), -latents)
    first = torch.tensor([0])
    assert torch.isfinite(prediction_target(schedule, latents, noise, first)).all()
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    assert torch.isfinite(snr).all() and snr[-1] == 0


@pytest.mark.parametrize(
    "config", [{}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": "UNet"}]
)
def test_a_scheduler_of_other_models_is_refused(config):
    with pytest.raises(BaseModelError, match="scheduler of 'x' cannot be used"):
        make_scheduler("x", config, EPSILON, False)


def test_the_metadata_of_a_bake_is_read_back(tmp_path):
    folder = make_base("sd2", tmp_path / "base", predicts_v=True)
    single = save_single_file(folder, tmp_path / "one.safetensors")
    with safe_open(single, "pt") as file:
        assert "unet/config.json" in json.loads(file.metadata()[METADATA_KEY])
    assert find_prediction(open_base(str(single))) == Prediction(V, True, False)


def test_damaged_or_wicked_metadata_is_refused(tmp_path):
    single = save_single_file(make_base("sd2", tmp_path / "base"), tmp_path / "one.safetensors")
    tensors = load_file(single)
    with safe_open(single, "pt") as file:
        files = json.loads(file.metadata()[METADATA_KEY])
    for wrong in (
        "[",
        json.dumps([]),
        json.dumps(files | {"unet/config.json": "["}),
        json.dumps(files | {"scheduler/scheduler_config.json": "[]"}),
        json.dumps(files | {"tokenizer/../../x": "written elsewhere"}),
    ):
        save_file(tensors, single, {METADATA_KEY: wrong})
        with pytest.raises(BaseModelError, match="is damaged"):
            open_base(str(single)).config("unet")
