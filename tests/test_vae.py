"""Another VAE for a base model: from every kind of file, or refused."""

import json
import shutil

import pytest
import torch
from make_bases import make_base, save_single_file
from safetensors.torch import load_file, save_file

from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a base, another whole model whose VAE alone differs)."""
    root = tmp_path_factory.mktemp("bases")
    base = make_base("sd1", root / "one")
    other = shutil.copytree(base, root / "other")
    file = next((other / "vae").glob("*.safetensors"))
    save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, file)
    return base, other


def load(base, vae=None):
    return load_base_model(str(base), CPU, torch.float32, vae=None if vae is None else str(vae))


def sources(other, folder):
    """{name: path} of the other VAE in every form."""
    single = save_single_file(other, folder / "whole.safetensors")
    original = load_file(single)
    start = "first_stage_model."
    vae = {key: tensor for key, tensor in original.items() if key.startswith(start)}
    save_file(vae, folder / "prefixed.safetensors")
    bare = {key.removeprefix(start): tensor for key, tensor in vae.items()}
    save_file(bare | {"loss.logvar": torch.ones(1)}, folder / "bare.safetensors")
    shutil.copy(next((other / "vae").glob("*.safetensors")), folder / "diffusers.safetensors")
    files = {name: folder / f"{name}.safetensors"
             for name in ("whole", "prefixed", "bare", "diffusers")}  # fmt: skip
    return files | {"model folder": other, "its own folder": other / "vae"}


def test_every_form_gives_the_same_vae(made, tmp_path):
    base, other = made
    plain, expected = load(base), load(other).vae.state_dict()
    for name, path in sources(other, tmp_path).items():
        loaded = load(base, path)
        state = loaded.vae.state_dict()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items()), name
        assert loaded.vae_fingerprint() != plain.vae_fingerprint()
        assert loaded.text_fingerprint() == plain.text_fingerprint()
        loaded.release("vae")
        assert loaded.encode_picture(torch.zeros(1, 3, 16, 16))[0].shape == (1, 4, 8, 8), name
        again = loaded.vae.state_dict()
        assert all(torch.equal(again[key], tensor) for key, tensor in expected.items()), name


def test_a_checkpoint_without_a_vae_takes_another(made, tmp_path):
    base, other = made
    path = save_single_file(base, tmp_path / "one.safetensors")
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k: t for k, t in load_file(path).items() if not k.startswith("first_stage_model.")}
    save_file(tensors, path, metadata)
    with pytest.raises(BaseModelError, match="holds no VAE: name one with base.vae"):
        load(path)
    assert torch.equal(load(path, other).vae.decoder.conv_out.bias,
                       load(other).vae.decoder.conv_out.bias)  # fmt: skip


def refused(base, vae, *words):
    with pytest.raises(BaseModelError) as caught:
        load(base, vae)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_a_vae_of_other_shapes_or_scales_is_refused(made, tmp_path):
    base, other = made
    wrong = shutil.copytree(other / "vae", tmp_path / "vae")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    refused(base, wrong, "another kind of model", "scaling_factor 0.13025 instead of 0.18215")
    tensors = load_file(other / "vae" / "diffusion_pytorch_model.safetensors")
    tensors["decoder.conv_in.weight"] = torch.ones(8, 16, 3, 3)
    save_file(tensors, tmp_path / "one.safetensors")
    refused(base, tmp_path / "one.safetensors", "1 of another shape", "8x16x3x3")


def test_what_is_no_vae_is_refused(made, tmp_path):
    base, other = made
    refused(base, tmp_path / "nowhere", "There is no VAE")
    refused(base, tmp_path, "not a VAE's folder")
    refused(base, other / "unet", "is a UNet2DConditionModel")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    refused(base, tmp_path / "a.safetensors", "is not a VAE")
    torch.save({}, tmp_path / "a.pt")
    refused(base, tmp_path / "a.pt", "python -c")
    (tmp_path / "b.safetensors").write_bytes(b"x")
    refused(base, tmp_path / "b.safetensors", "damaged")
