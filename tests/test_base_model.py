"""Base models: loaded whole, or refused in a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_sd.base_model import load_base_model
from lora_sd.errors import BaseModelError

CPU = torch.device("cpu")


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the small model that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def load(folder):
    return load_base_model(str(folder), CPU, torch.float32)


def weights_of(folder, part):
    return next((folder / part).glob("*.safetensors"))


def test_a_folder_loads_frozen_and_in_evaluation_mode(folder):
    base = load(folder)
    for part in (base.unet, base.text_encoder, base.vae):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert base.prediction_type == "epsilon" and base.resolution_px == 16


def test_the_fingerprint_is_the_same_each_time_and_changes_with_a_weight(folder):
    first = load(folder).fingerprint()
    assert load(folder).fingerprint() == first
    file = weights_of(folder, "unet")
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert load(folder).fingerprint() != first


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("damage", ["cut", "lacking", "missing"])
def test_weights_that_are_not_whole_are_refused(folder, part, damage):
    file = weights_of(folder, part)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif damage == "missing":
        file.unlink()
    else:
        tensors = load_file(file)
        del tensors[sorted(tensors)[0]]
        save_file(tensors, file, {"format": "pt"})
    said = {"cut": "is damaged", "missing": "is missing", "lacking": "1 missing"}[damage]
    with pytest.raises(BaseModelError, match=f"{part}.*{said}|{said}.*'{part}"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "There is no base model 'nowhere'"),
        ("x" * 300, "File name too long"),
        (".", "holds no model_index.json"),
    ],
)
def test_a_name_that_is_no_model_is_refused(name, said):
    with pytest.raises(BaseModelError, match=said):
        load_base_model(name, CPU, torch.float32)


def test_an_inpainting_unet_is_refused(folder):
    for file, key in ((folder / "unet" / "config.json", "in_channels"),):
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, key: 9}))
    file = weights_of(folder, "unet")
    tensors = load_file(file)
    tensors["conv_in.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseModelError, match="an inpainting model.*9 channels"):
        load(folder)


def test_a_folder_without_its_tokenizer_is_refused(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(BaseModelError, match="base model"):
        load(folder)
