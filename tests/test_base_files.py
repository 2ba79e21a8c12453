"""Base models as files: read tensor by tensor, or refused in a sentence."""

import json
import shutil

import pytest
import torch
from make_bases import KINDS, assert_same_tensors, make_base, tensors_of
from safetensors.torch import load_file, save_file

from lora_sd.base_files import BaseFiles, open_base, weight_files
from lora_sd.base_files.original import to_original
from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError


@pytest.fixture(scope="session", params=KINDS)
def folder(request, tmp_path_factory):
    """A miniature of each kind."""
    return make_base(request.param, tmp_path_factory.mktemp(request.param) / "base")


def save_single_file(base: BaseFiles, path, **more):
    """The base as one file, by safetensors' own writer."""
    pieces = to_original(base.tensor_shapes, base.has_open_clip)
    tensors = {piece.key: piece.join([base.tensor(n) for n in piece.names]) for piece in pieces}
    save_file({key: tensor.contiguous() for key, tensor in (tensors | more).items()}, path)
    return path


def test_a_folder_and_its_single_file_hold_the_same(folder, tmp_path):
    base = open_base(str(folder))
    single = open_base(str(save_single_file(base, tmp_path / "one.safetensors")))
    assert_same_tensors(single, base)
    assert single.shapes == base.shapes and single.has_open_clip == base.has_open_clip
    assert base.is_folder and not single.is_folder and single.rest == []


def test_layers_are_those_that_an_adapter_can_have(model_folder):
    base = load_base_model(str(model_folder), torch.device("cpu"), torch.float32)
    files = open_base(str(model_folder))
    unet = {name: module.weight.shape for name, module in base.unet.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}  # fmt: skip
    text = {name for name in files.shapes if name.startswith("text_encoder.")}
    assert {n: s for n, s in files.shapes.items() if n not in text} == {
        f"unet.{name}": shape for name, shape in unet.items()
    }
    assert len(text) == 6 + 1  # q, k, v, out, fc1, fc2 and the token table
    assert "text_encoder.text_model.embeddings.token_embedding" in text


def test_weights_are_read_as_they_are(model_folder):
    files = open_base(str(model_folder))
    base = load_base_model(str(model_folder), torch.device("cpu"), torch.float32)
    layer = base.unet.mid_block.attentions[0].proj_in
    assert torch.equal(files.read("unet.mid_block.attentions.0.proj_in"), layer.weight)
    assert torch.equal(files.tensor("unet.mid_block.attentions.0.proj_in.bias"), layer.bias)


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "60KB"}])
def test_variants_and_shards(options, tmp_path):
    again = make_base("sd1", tmp_path / "again", **options)
    plain = make_base("sd1", tmp_path / "plain")
    assert list(again.rglob("*.fp16.*" if "variant" in options else "*-of-0*"))
    assert_same_tensors(open_base(str(again)), open_base(str(plain)))


def test_the_plain_variant_is_preferred(tmp_path):
    for name in ("model.fp16.safetensors", "model.safetensors", "model.non_ema.safetensors"):
        (tmp_path / name).touch()
    assert weight_files(tmp_path, "model") == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    assert weight_files(tmp_path, "model") == [tmp_path / "model.fp16.safetensors"]


def test_older_names_in_a_folder(model_folder, tmp_path):
    """VAE attention as diffusers once called it, text encoders as transformers before 5.6."""
    older = shutil.copytree(model_folder, tmp_path / "older")
    vae, text = (
        older / "vae/diffusion_pytorch_model.safetensors",
        older / "text_encoder/model.safetensors",
    )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in load_file(vae).items():
        for new, name in old.items():
            key = key.replace(f".{new}.", f".{name}.")
        tensors[key] = tensor
    save_file(tensors, vae)
    save_file(
        {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}, text
    )
    assert_same_tensors(open_base(str(older)), open_base(str(model_folder)))


def test_families_by_shape(model_folder):
    assert open_base("tiny-sd").family == "tiny-sd"
    assert open_base(str(model_folder)).family == ""


def test_the_rest_of_a_single_file_is_kept_apart(folder, tmp_path):
    base = open_base(str(folder))
    more = {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
    single = open_base(str(save_single_file(base, tmp_path / "one.safetensors", **more)))
    assert {stored.key for stored in single.rest} == more.keys()
    assert tensors_of(single).keys() == tensors_of(base).keys()


def refused(path, *words):
    with pytest.raises(BaseModelError) as caught:
        open_base(str(path))
    for word in words:
        assert word in str(caught.value), str(caught.value)


def cached(folder, hub, hub_id):
    """Lay a folder into a hub cache, as huggingface_hub does."""
    place = hub / f"models--{hub_id.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0a1b2c")
    return shutil.copytree(folder, place / "snapshots" / "0a1b2c")


def test_a_hub_id_is_found_in_the_cache(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    refused("some/model", "no base model 'some/model' on this machine yet")
    snapshot = cached(model_folder, tmp_path, "some/model")
    assert_same_tensors(open_base("some/model"), open_base(str(model_folder)))
    (snapshot / "unet" / "config.json").unlink()
    refused("some/model", "in part only", "'unet/config.json' is missing")
    shutil.rmtree(snapshot / "vae")
    refused("some/model", "in part only", "diffusion_pytorch_model.safetensors' is missing")


def test_what_is_not_there_or_pickled_is_refused(tmp_path):
    refused("a" * 300, "File name too long")
    refused("~nobody-of-that-name/x", "There is no base model")
    refused(tmp_path / "none", "There is no base model", "tiny-sd")
    refused(tmp_path, "no model_index.json")
    (tmp_path / "old.ckpt").touch()
    refused(tmp_path / "old.ckpt", "pickled", ".safetensors")


def test_a_folder_of_pickles_or_without_weights_is_refused(model_folder, tmp_path):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").rename(
        broken / "vae" / "diffusion_pytorch_model.bin"
    )
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    refused(broken, "is pickled", "python -c", "'diffusion_pytorch_model.safetensors' is missing")


def test_a_missing_shard_is_named(tmp_path):
    folder = make_base("sd1", tmp_path / "base", max_shard_size="60KB")
    next((folder / "unet").glob("*-of-0*")).unlink()
    refused(folder, "lacks", "00001-of-0")


def test_a_damaged_index_is_refused(model_folder, tmp_path):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / "model_index.json").write_text("[")
    refused(broken, "model_index.json' is damaged")


def test_a_truncated_file_is_refused(model_folder, tmp_path):
    single = save_single_file(open_base(str(model_folder)), tmp_path / "one.safetensors")
    single.write_bytes(single.read_bytes()[:-100])
    refused(single, "cut short", "Get it again")
    single.write_bytes(b"no header")
    refused(single, "no safetensors file")


@pytest.mark.parametrize(
    "key, said",
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "a Flux model"),
        ("joint_blocks.0.x_block.attn.qkv.weight", "a Stable Diffusion 3 model"),
        ("model.diffusion_model.transformer.weight", "another kind of model"),
        ("encoder.conv_in.weight", "a VAE"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "an adapter"),
        ("down_blocks.0.resnets.0.conv1.weight", "one part of a diffusers folder"),
        ("encoder.weight", "not a Stable Diffusion checkpoint"),
    ],
)
def test_foreign_files_are_refused(key, said, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "one.safetensors")
    refused(tmp_path / "one.safetensors", said)


def test_inpainting_models_are_refused(model_folder, tmp_path):
    base = open_base(str(model_folder))
    conv_in = "model.diffusion_model.input_blocks.0.0.weight"
    file = tmp_path / "one.safetensors"
    refused(
        save_single_file(base, file, **{conv_in: torch.ones(8, 9, 3, 3)}),
        "an inpainting model",
        "9 channels",
    )


@pytest.mark.parametrize(
    "channels, said",
    [(5, "a depth-to-image"), (8, "an InstructPix2Pix"), (3, "3 channels")],
)
def test_models_that_are_given_more_than_noise_are_refused(model_folder, tmp_path, channels, said):
    conv_in = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(8, channels, 3, 3)}
    path = save_single_file(open_base(str(model_folder)), tmp_path / "one.safetensors", **conv_in)
    refused(path, said)


def test_sdxl_s_refiner_is_refused(model_folder, tmp_path):
    more = {"conditioner.embedders.0.model.ln_final.weight": torch.ones(4)}
    path = save_single_file(open_base(str(model_folder)), tmp_path / "one.safetensors", **more)
    refused(path, "SDXL's refiner")


def test_folders_of_other_kinds_of_model_are_refused(model_folder, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (other / "model_index.json").write_text(json.dumps(index))
    refused(other, "is a FluxPipeline", "only Stable Diffusion 1, 2 and XL")


def test_unknown_number_formats_are_refused(model_folder, tmp_path):
    file = save_single_file(open_base(str(model_folder)), tmp_path / "one.safetensors")
    data = file.read_bytes()
    file.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"U32"', 1))
    refused(file, "number format U32")
