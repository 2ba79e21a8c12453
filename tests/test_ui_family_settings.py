"""The form's settings follow the family of the base model."""

import json
from pathlib import Path
from typing import Any

import pytest
from make_bases import published_shapes

from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.ui import fields
from lora_sd.ui.train import family_settings
from lora_sd.ui.train.family_settings import CONFIGS, FamilySettings, follow, settings_of

XL = "nobody/some-xl-model"


def form(config: Config, **changes: Any) -> dict[str, Any]:
    values = fields.form_values(config, fields.FIELDS)
    shown = {name: fields.shown_value(name, value) for name, value in values.items()}
    return shown | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.fixture
def tiny() -> Config:
    return config_from_values(read_yaml(CONFIGS["tiny-sd"]))


@pytest.fixture
def before() -> FamilySettings:
    return settings_of("tiny-sd")


def test_another_family_sets_the_form_as_its_config_has_it(
    tiny: Config, before: FamilySettings
) -> None:
    sent = form(tiny, base__model=XL)
    followed = follow(sent, before)
    config = fields.config_from_form(sent | followed.updates)
    own = config_from_values(read_yaml(CONFIGS["sdxl"]))
    assert config.train == own.train and config.adapter == own.adapter
    assert config.data.resolution_px == [1024] and config.output == own.output
    assert config.sample == own.sample.model_copy(update={"prompts": tiny.sample.prompts})
    assert config.data.folder == tiny.data.folder and config.base.model == XL
    assert followed.sentence.startswith(f"'{XL}' is not on this machine yet; its name tells of")
    assert "Set for SDXL: Resolution (px), Rank, " in followed.sentence

    # and back again
    sent = sent | followed.updates | {"base.model": "tiny-sd"}
    back = follow(sent, followed.settings)
    assert sent | back.updates == form(tiny)


def test_what_was_changed_by_hand_stays(tiny: Config, before: FamilySettings) -> None:
    sent = form(tiny, base__model=XL, adapter__rank=32, data__resolution_px="768")
    followed = follow(sent, before)
    assert not {"adapter.rank", "data.resolution_px"} & followed.updates.keys()
    assert followed.updates["optimizer.learning_rate"] == 1e-4
    assert followed.sentence.endswith("Left as you set them: Resolution (px), Rank.")
    sent = sent | followed.updates | {"base.model": "tiny-sd"}
    assert follow(sent, followed.settings).updates.keys() == followed.updates.keys()


@pytest.mark.parametrize(
    "model", ["tiny-sd", "", "no such", "models/xl.safetensors", str(CONFIGS["sdxl"])]
)
def test_nothing_is_set_for_the_same_family_or_none(
    tiny: Config, before: FamilySettings, model: str
) -> None:
    followed = follow(form(tiny, base__model=model, train__steps=3), before)
    assert not followed.updates and followed.settings == before and not followed.sentence


def test_the_family_is_told_by_the_files(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    unet = {
        name.partition(".")[2]: shape
        for name, shape in published_shapes("sd21").items()
        if name.startswith("unet.")
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in unet.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    (tmp_path / "unet").mkdir()
    text = json.dumps(header).encode()
    with open(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # all zeros, which take no room
    assert family_settings.family_of(str(tmp_path)) == ("sd21", False)


def test_a_damaged_config_is_told(
    tiny: Config, before: FamilySettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "sdxl.yaml"
    damaged.write_text("train: {steps: none}")
    monkeypatch.setitem(CONFIGS, "sdxl", damaged)
    followed = follow(form(tiny, base__model=XL), before)
    assert not followed.updates and "'train.steps'" in followed.sentence
