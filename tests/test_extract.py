"""`extract`: what is baked in comes out again."""

import shutil

import pytest
import torch
from make_adapters import random_adapter
from make_bases import KINDS, make_base
from safetensors.torch import load_file, save_file
from test_bake import bake_both

from lora_sd.__main__ import main
from lora_sd.adapter import Adapter
from lora_sd.algebra.extraction import extract
from lora_sd.base_files import open_base
from lora_sd.errors import AdapterError, BaseModelError, ConfigError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.parts import Scales
from lora_sd.verbs.bake import bake
from lora_sd.verbs.extract import extract as extract_file

UNET = "unet/diffusion_pytorch_model.safetensors"
PROJ = "mid_block.attentions.0.proj_in"


def assert_same_deltas(found, expected, base):
    """Every layer's update is the same to the rounding of the base's float32 weights."""
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        rounding = 4e-7 * base.read(name).abs().max()
        gap = (found.layers[name].delta() - layer.delta()).abs().max()
        assert gap <= 1e-6 * layer.delta().abs().max() + rounding, name


@pytest.mark.parametrize("kind", KINDS)
def test_extract_undoes_bake(kind, tmp_path):
    """Also between a folder and a single file."""
    folder = make_base(kind, tmp_path / "base")
    base = open_base(str(folder))
    adapter = random_adapter(base.shapes)
    tuned = bake_both(folder, tmp_path, [(adapter, Scales())])
    for one in tuned:
        found = extract(one, base, rank=2)
        assert_same_deltas(found.adapter, adapter, base)
        assert found.error.of() < 1e-5 and max(found.errors.values()) < 1e-5
        assert found.left_over == found.unchanged == found.unmatched == []


def test_the_file_written_holds_the_deltas(model_folder, tmp_path):
    base = open_base(str(model_folder))
    adapter = random_adapter(base.shapes)
    save_adapter(adapter, tmp_path / "a.safetensors", torch.float32)
    bake(str(model_folder), [(tmp_path / "a.safetensors", Scales())], tmp_path / "tuned")
    output = tmp_path / "b.safetensors"
    extract_file(str(tmp_path / "tuned"), str(model_folder), output, rank=2, dtype="float32")
    assert_same_deltas(load_adapter(output, base.shapes), adapter, base)


def one_layer_changed(model_folder, path, change, key=f"{PROJ}.weight"):
    """The model with `change` of one tensor of its UNet in its place."""
    tuned = shutil.copytree(model_folder, path)
    tensors = load_file(tuned / UNET)
    tensors[key] = change(tensors[key])
    save_file(tensors, tuned / UNET)
    return open_base(str(tuned))


def noise_of(weight):
    return weight + torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


def test_the_stated_error_is_the_true_one(model_folder, tmp_path):
    tuned, base = (
        one_layer_changed(model_folder, tmp_path / "t", noise_of),
        open_base(str(model_folder)),
    )
    found = extract(tuned, base, rank=3)
    ((name, layer),) = found.adapter.layers.items()
    delta = tuned.read(name) - base.read(name)
    error = float((layer.delta() - delta).norm() / delta.norm())
    values = torch.linalg.svdvals(delta.flatten(1))
    assert name == f"unet.{PROJ}" and layer.alpha == 3
    assert found.errors[name] == pytest.approx(error, rel=1e-5)
    assert error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-5)
    assert found.error.of() == pytest.approx(error, rel=1e-5)


def test_energy_takes_the_lowest_rank_that_holds_it(model_folder, tmp_path):
    tuned, base = (
        one_layer_changed(model_folder, tmp_path / "t", noise_of),
        open_base(str(model_folder)),
    )
    ((name, layer),) = extract(tuned, base, 16, energy=0.9).adapter.layers.items()
    lost = (layer.delta() - (tuned.read(name) - base.read(name))).square().sum()
    ((_, less),) = extract(tuned, base, layer.rank - 1).adapter.layers.items()
    lost_by_less = (less.delta() - (tuned.read(name) - base.read(name))).square().sum()
    allowed = 0.1 * (tuned.read(name) - base.read(name)).square().sum()
    assert 1 < layer.rank < 16 and lost <= allowed < lost_by_less


def test_ranks_are_cut_to_what_the_layer_allows(model_folder, tmp_path):
    base = open_base(str(model_folder))
    adapter = random_adapter(base.shapes)
    tuned, _ = bake_both(model_folder, tmp_path, [(adapter, Scales())])
    found = extract(tuned, base, 1000, conv_rank=2)
    for name, layer in found.adapter.layers.items():
        shape = base.shapes[name]
        conv = name.startswith("unet.") and len(shape) == 4 and shape[2] > 1
        assert layer.rank == (2 if conv else min(shape[0], shape[1:].numel())), name
        assert layer.alpha == (2 if conv else 1000)
    assert_same_deltas(found.adapter, adapter, base)


def test_what_no_adapter_holds_is_counted(model_folder, tmp_path):
    tuned = one_layer_changed(model_folder, tmp_path / "t", noise_of)
    for key in (f"{PROJ}.bias", "conv_norm_out.weight"):
        tuned = one_layer_changed(tuned.path, tmp_path / key, noise_of, key)
    found = extract(tuned, open_base(str(model_folder)), 4)
    assert found.left_over == ["unet.conv_norm_out.weight", f"unet.{PROJ}.bias"]
    assert len(found.unchanged) == len(tuned.shapes) - 2  # the layer and the token table


def test_text_encoders_can_be_left_out(model_folder, tmp_path):
    base = open_base(str(model_folder))
    tuned, _ = bake_both(model_folder, tmp_path, [(random_adapter(base.shapes), Scales())])
    found = extract(tuned, base, 2, text_encoders=False)
    assert {name.split(".")[0] for name in found.adapter.layers} == {"unet"}


def test_small_differences_are_left_out_by_threshold(model_folder, tmp_path):
    tuned = one_layer_changed(model_folder, tmp_path / "t", lambda weight: weight * 1.01)
    base = open_base(str(model_folder))
    assert len(extract(tuned, base, 2, threshold=0.009).adapter.layers) == 1
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(tuned, base, 2, threshold=0.011)


def test_rounding_to_another_dtype_is_no_difference(model_folder, tmp_path):
    half, _ = bake_both(model_folder, tmp_path, [], torch.float16)
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(half, open_base(str(model_folder)), 2)
    with pytest.raises(AdapterError, match="nothing to extract"):
        extract(open_base(str(model_folder)), half, 2)


def test_models_of_different_kinds_are_refused(model_folder):
    with pytest.raises(BaseModelError, match="no fine-tuned 'tiny-sd'"):
        extract(open_base(str(model_folder)), open_base("tiny-sd"), 2)


def test_the_last_layer_that_sd2_folders_lack_is_told(tmp_path):
    folder = make_base("sd2", tmp_path / "base")
    adapter = random_adapter(open_base(str(folder)).shapes)
    _, single = bake_both(folder, tmp_path, [(adapter, Scales())])
    tensors = load_file(single.path)
    one_more = {
        key.replace("resblocks.1.", "resblocks.2."): tensor.clone()
        for key, tensor in tensors.items()
        if "resblocks.1." in key
    }
    save_file(tensors | one_more, single.path)
    found = extract(open_base(str(single.path)), open_base(str(folder)), 2)
    assert len(found.unmatched) == 6 and all(".layers.2." in name for name in found.unmatched)
    assert found.adapter.layers.keys() == adapter.layers.keys()


def test_settings_out_of_range_are_refused(model_folder, tmp_path):
    for wrong in ({"rank": 0}, {"energy": 1.5}, {"threshold": -1.0}):
        with pytest.raises(ConfigError):
            extract_file(str(model_folder), str(model_folder), tmp_path / "x.safetensors", **wrong)


def test_the_command_line(tmp_path, capsys):
    base = open_base("tiny-sd")
    adapter = random_adapter({n: s for n, s in base.shapes.items() if "attn" in n})
    save_adapter(Adapter(adapter.layers), tmp_path / "a.safetensors")
    bake("tiny-sd", [(tmp_path / "a.safetensors", Scales())], tmp_path / "tuned", dtype="float32")
    output = tmp_path / "b.safetensors"
    assert main(["extract", f"{tmp_path}/tuned", "tiny-sd", "-o", str(output), "--layers"]) == 0
    said = capsys.readouterr().out
    assert f"{len(adapter.layers)} layers" in said and "error" in said and "do not differ" in said
    count = len(adapter.layers)
    assert f"Read back: {count} of {count} modules match by the naming rules" in said
    assert output.is_file()
