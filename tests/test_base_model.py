"""Base models: loaded whole from every source and let go again, or refused in a sentence."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import choose
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from make_bases import make_base, save_single_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_sd import inject
from lora_sd.base_files import hub
from lora_sd.base_loading import load_base_model
from lora_sd.errors import BaseModelError

CPU = torch.device("cpu")
KINDS = ["sd1", "sd2", "sd2-v", "sdxl", "sdxl-v"]
PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: (folder, single file)} of miniatures."""
    root = tmp_path_factory.mktemp("bases")
    made = {}
    for kind in KINDS:
        name, _, predicts_v = kind.partition("-")
        folder = make_base(name, root / kind, bool(predicts_v))
        made[kind] = (folder, save_single_file(folder, root / f"{kind}.safetensors"))
    return made


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the small model that a test may damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


def load(path, dtype=torch.float32, **options):
    return load_base_model(str(path), CPU, dtype, **options)


def weights_of(folder, part):
    return next((folder / part).glob("*.safetensors"))


def states(base):
    return {
        f"{part}.{key}": tensor
        for part in PARTS
        if getattr(base, part) is not None
        for key, tensor in getattr(base, part).state_dict().items()
    }


def assert_same_weights(one, other):
    mine, theirs = states(one), states(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def predicted(base):
    noise = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=noise)
    time_ids = torch.tensor([[64, 48, 0, 8, 16, 16]] * 2)
    return base.predict(noisy, torch.tensor([10, 900]), base.encode_text(["a", "b"]), time_ids)


# --- every source ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_and_its_single_file_are_the_same_model(bases, kind):
    folder, single = (load(path) for path in bases[kind])
    assert_same_weights(folder, single)
    assert torch.equal(predicted(folder), predicted(single))
    for base in (folder, single):
        predicts_v = kind.endswith("-v")
        assert base.prediction_type == ("v_prediction" if predicts_v else "epsilon")
        assert base.zero_terminal_snr == (kind == "sdxl-v") and base.prediction_type_is_known
        assert base.has_pooled == kind.startswith("sdxl")
        assert base.components.keys() == {p for p in PARTS if p != "vae" and getattr(base, p)}
        assert (base.resolution_px, base.vae_factor, base.size_step_px) == (16, 2, 4)
    for one, other in zip(folder.tokenizers, single.tokenizers, strict=True):
        assert one("A cat! 猫").input_ids[:3] == other("A cat! 猫").input_ids[:3]
        assert one.pad_token_id == other.pad_token_id
    assert folder.vae_fingerprint() == single.vae_fingerprint()
    # '!' in a text is another token to a tokenizer that pads with it.
    same_tokens = kind == "sd1"
    assert (folder.text_fingerprint() == single.text_fingerprint()) == same_tokens
    assert (folder.fingerprint() == single.fingerprint()) == same_tokens


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_of_from_pretrained(bases, kind, dtype):
    base = load(bases[kind][0], dtype)
    which = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    pipeline = which.from_pretrained(bases[kind][0], dtype=dtype)
    for part in PARTS[: 4 if kind == "sdxl" else 3]:
        ours, theirs = getattr(base, part), getattr(pipeline, part)
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for key, tensor in ours.state_dict().items():
            assert tensor.dtype == state[key].dtype and torch.equal(tensor, state[key]), key
    expected = pipeline.encode_prompt("a cat", device=CPU, num_images_per_prompt=1,
                                      do_classifier_free_guidance=False)  # fmt: skip
    embedding = base.encode_text(["a cat"])
    assert torch.equal(embedding.hidden, expected[0])
    latents = torch.ones(1, 4, 8, 8, dtype=dtype)
    more = {"added_cond_kwargs": {"text_embeds": embedding.pooled,
                                  "time_ids": torch.ones(1, 6, dtype=dtype)}}  # fmt: skip
    theirs = pipeline.unet(latents, torch.tensor([5]), embedding.hidden, **more).sample
    ours = base.predict(latents, torch.tensor([5]), embedding, torch.ones(1, 6))
    assert torch.equal(ours, theirs)


def test_a_bake_of_the_embedded_base_loads_with_its_own_tokens(tmp_path):
    single = load(save_single_file("tiny-sd", tmp_path / "one.safetensors"))
    base = load("tiny-sd")
    assert_same_weights(single, base)
    assert single.prediction_type == "v_prediction" and single.resolution_px == 64
    texts = ["fox, ink drawing!", "Zwölf 😀"]
    assert torch.equal(single.tokens(texts), base.tokens(texts))
    assert single.scheduler.config == base.scheduler.config


def test_a_single_file_that_does_not_say_how_it_is_built_is_refused(bases, tmp_path):
    tensors = load_file(bases["sd1"][1])
    save_file(tensors, tmp_path / "bare.safetensors")
    with pytest.raises(BaseModelError, match="of no published family.*does not say how"):
        load(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
    "dtype, there, expected",
    [
        (torch.float32, None, [None]),
        (torch.float32, "fp16", [None, "fp16"]),
        (torch.bfloat16, "fp16", ["fp16"]),
        (torch.float16, None, ["fp16", None]),
    ],
)
def test_a_hub_s_model_is_fetched_without_pickles_and_programs(
    bases, monkeypatch, dtype, there, expected
):
    """Half the bytes first where half the precision is enough."""
    asked = []

    def download(name, **options):
        asked.append((name, options["variant"]))
        assert options["use_safetensors"] and options["trust_remote_code"] is False
        if options["variant"] != there:
            raise OSError("no such files")
        return str(bases["sd1"][0])

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    assert load("some/model", dtype).name == "some/model"
    assert asked == [("some/model", variant) for variant in expected]


def test_a_model_that_cannot_be_fetched_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BaseModelError, match="'no/model'.*cannot be fetched from the hub: .") as e:
        load("no/model")
    assert len(e.value.problems) == 1 and "\n" not in str(e.value)


@pytest.mark.parametrize("half", [False, True])
def test_why_the_plain_files_cannot_be_fetched_is_told(monkeypatch, half):
    def download(name, *, variant, **options):
        raise OSError(f"no {variant} files")

    monkeypatch.setattr(DiffusionPipeline, "download", download)
    with pytest.raises(BaseModelError, match="fetched from the hub: no None files"):
        hub.fetch("some/model", half)


# --- what it can do ---


def test_a_folder_loads_frozen_and_in_evaluation_mode(folder):
    base = load(folder)
    for part in (base.unet, base.text_encoder, base.vae):
        assert not part.training and not any(p.requires_grad for p in part.parameters())
    assert base.prediction_type == "epsilon" and base.resolution_px == 16


def test_sd_2_s_size_follows_from_what_it_predicts(bases):
    """Of a single file, which does not say it; a folder does."""
    base = load(bases["sd2"][1])
    assert base.resolution_px == 16
    files = base.sources["unet"].files
    files.__dict__["family"] = "sd21"
    files.__dict__["_packed"] = {}
    assert base.resolution_px == 512
    base.set_prediction_type("v_prediction")
    assert base.resolution_px == 768
    assert base.noise_schedule().config.prediction_type == "v_prediction"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_is_released_leaves_memory_and_comes_back_bit_for_bit(bases, kind):
    base = load(bases[kind][1])
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    before = {name: tensor.clone() for name, tensor in states(base).items()}
    latents, text = base.encode_picture(pixels), base.encode_text(["a cat"])
    prints = base.fingerprint(), base.vae_fingerprint(), base.text_fingerprint()
    parts = [part for part in PARTS if part != "unet" and getattr(base, part) is not None]
    base.release(*parts)
    for part in parts:
        assert all(weight.is_meta for weight in getattr(base, part).parameters())
    assert prints == (base.fingerprint(), base.vae_fingerprint(), base.text_fingerprint())
    assert base.device == CPU and base.vae_factor == 2
    again = base.encode_text(["a cat"])
    assert torch.equal(again.hidden, text.hidden)
    assert base.vae.device.type == "meta"  # only what is wanted comes back
    assert all(map(torch.equal, base.encode_picture(pixels), latents))
    base.release(*parts)
    base.restore()
    after = states(base)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    base.vae.encoder.conv_in.bias.data += 1  # what is back is not read again
    assert not torch.equal(base.encode_picture(pixels)[0], latents[0])
    assert not any(weight.requires_grad for weight in base.text_encoder.parameters())


def test_an_encoder_with_an_adapter_is_not_released(base):
    inject.attach(base.components, choose(base.components))
    with pytest.raises(ValueError, match="has adapters in it"):
        base.release("text_encoder")
    base.release("vae")


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_file_that_was_replaced_meanwhile_is_not_read_without_a_word(folder, part):
    base = load(folder)
    before = {name: tensor.clone() for name, tensor in states(base).items()}
    base.release("vae", "text_encoder")
    file = weights_of(folder, part)
    tensors = load_file(file)
    shutil.copy(file, folder / "same")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    for _ in range(2):
        with pytest.raises(BaseModelError, match="has changed on disk since it was loaded"):
            base.restore()
    file.unlink()
    with pytest.raises(BaseModelError, match="cannot be read again: No such file"):
        base.restore()
    (folder / "same").rename(file)  # another time, the same weights
    base.restore()
    after = states(base)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("way", ["cpu", "keep"])
def test_idle_parts_may_stay_in_memory(base, way):
    """On the CPU, 'cpu' keeps them where they are."""
    base.idle.way = way
    parts = base.vae, base.text_encoder
    own = [weight.data_ptr() for part in parts for weight in part.parameters()]
    base.release("vae", "text_encoder")
    assert own == [weight.data_ptr() for part in parts for weight in part.parameters()]
    base.encode_text(["a"])
    inject.attach(base.components, choose(base.components))
    base.release("text_encoder")  # what is adapted may wait as well


def test_parts_that_wait_on_the_cpu_go_back_where_they_compute(base):
    moved = []
    base.idle.way = "cpu"
    base.vae.to = lambda device: moved.append(str(device))
    base.release("vae")
    base.encode_text(["a"])
    assert moved == ["cpu"]
    base.idle._device = torch.device("meta")
    base.restore()
    base.restore()
    assert moved == ["cpu", "meta"]


def test_pictures_are_encoded_as_the_vae_has_them(base):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, deviation = base.encode_picture(pixels)
    posterior = base.vae.encode(pixels).latent_dist
    scale = base.vae.config.scaling_factor
    assert torch.equal(mean, posterior.mean * scale) and mean.dtype == torch.float32
    torch.testing.assert_close(deviation, posterior.std * scale)
    assert mean.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_fingerprints_are_the_same_each_time_and_change_with_late_weights(bases, kind):
    """One number of a tensor is enough where the cache goes by them; half of one, of the UNet."""

    def prints(base):
        return base.fingerprint(), base.vae_fingerprint(), base.text_fingerprint()

    first = prints(load(bases[kind][0]))
    assert prints(load(bases[kind][0])) == first
    for part in PARTS[: 4 if kind == "sdxl" else 3]:
        base = load(bases[kind][0])
        for weight in list(getattr(base, part).parameters())[::8]:
            flat = weight.data.view(-1)
            before = flat.clone()
            flat[len(flat) // 2 if part == "unet" else -1 :] += 0.5
            changed = prints(replace(base))
            flat.copy_(before)
            assert [one != other for one, other in zip(changed, first, strict=True)] == [
                *(True, part == "vae", part.startswith("text"))
            ]


# --- narrow VAEs ---


def overflowing(vae):
    """Let the VAE's insides be too large for float16; what comes out is as before."""
    for block in (vae.encoder, vae.decoder):
        block.conv_in.weight.data *= 3e4
        block.conv_in.bias.data *= 3e4


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_overflows_in_float16_is_encoded_and_decoded_in_float32(bases, kind, tmp_path):
    model = shutil.copytree(bases[kind][0], tmp_path / "model")
    wide = load(model)
    overflowing(wide.vae)
    save_file(wide.vae.state_dict(), weights_of(model, "vae"), {"format": "pt"})
    wide = load(model)
    narrow = load(model, torch.float16)
    assert narrow.unet.dtype == torch.float16
    assert narrow.vae.dtype == (torch.float32 if kind == "sdxl" else torch.float16)
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if kind == "sd1":
        assert not torch.isfinite(narrow.vae.encode(pixels.half()).latent_dist.mean).all()
    before = {name: tensor.clone() for name, tensor in narrow.vae.state_dict().items()}
    mean, _ = narrow.encode_picture(pixels)
    expected, _ = wide.encode_picture(pixels)
    torch.testing.assert_close(mean, expected, rtol=0.02, atol=0.02)
    assert pixel_gap(narrow.decode(mean), wide.decode(mean)) <= 3
    after = narrow.vae.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def pixel_gap(some, others):
    """The largest difference of any channel of pictures, of 255."""
    gaps = [
        np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max()
        for one, other in zip(some, others, strict=True)
    ]
    return max(gaps)


def test_only_what_overflows_is_encoded_again(base):
    base.vae.to(torch.bfloat16)
    base.vae.encoder.conv_in.weight.data[:] = 0
    seen = []

    def encode(x):
        seen.append((x.dtype, len(x)))
        broken = x.dtype == torch.bfloat16
        return torch.where((x > 0.5) & broken, torch.nan, x)

    result = base._through_vae(encode, torch.tensor([0.0, 1.0, 0.25]).view(3, 1, 1, 1))
    assert result.flatten().tolist() == [0.0, 1.0, 0.25]
    assert seen == [(torch.bfloat16, 3), (torch.float32, 1)]
    assert base.vae.dtype == torch.bfloat16


def test_a_picture_that_is_no_number_is_an_error_and_not_black(base):
    with pytest.raises(BaseModelError, match="not finite numbers"):
        base.decode(torch.full((1, 4, 8, 8), torch.nan))
    mean, _ = base.encode_picture(torch.full((1, 3, 16, 16), torch.nan))
    assert not torch.isfinite(mean).any()  # the caller names the picture


# --- what cannot be used ---


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
        ("models/cat.safetensors", "There is no base model.*Name a diffusers folder"),
        ("x" * 300, "File name too long"),
        (".", "holds no model_index.json"),
    ],
)
def test_a_name_that_is_no_model_is_refused(name, said):
    with pytest.raises(BaseModelError, match=said):
        load_base_model(name, CPU, torch.float32)


def test_an_inpainting_unet_is_refused(folder):
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": 9}))
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


def test_every_problem_is_told_at_once(folder):
    for part in ("unet", "vae"):
        file = weights_of(folder, part)
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors["stray.weight"] = tensors.pop(name)
        tensors[sorted(tensors)[1]] = torch.zeros(1, 2, 3)
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(BaseModelError) as caught:
        load(folder)
    for part, problem in zip(("UNet", "VAE"), caught.value.problems, strict=True):
        for word in (
            part,
            "1 missing",
            "1 unexpected",
            "stray.weight",
            "1 of another shape",
            "1x2x3",
        ):
            assert word in problem


def test_the_unused_last_layer_of_sd_2_is_left_out(bases, tmp_path):
    """Single files of SD 2 hold 24 layers, folders 23."""
    part = "cond_stage_model.model.transformer.resblocks"
    tensors = load_file(bases["sd2"][1])
    more = {key.replace(".1.", ".23."): tensor.clone() for key, tensor in tensors.items()
            if key.startswith(f"{part}.1.")}  # fmt: skip
    with safe_open(bases["sd2"][1], "pt") as file:
        save_file(tensors | more, tmp_path / "one.safetensors", file.metadata())
    assert more
    assert_same_weights(load(tmp_path / "one.safetensors"), load(bases["sd2"][0]))


def test_a_damaged_config_is_one_sentence(folder):
    (folder / "unet" / "config.json").write_text(json.dumps({"down_block_types": ["NoBlock"]}))
    with pytest.raises(BaseModelError, match="damaged config of its UNet"):
        load(folder)
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="lacks 'unet/config.json'"):
        load(folder)


@pytest.mark.parametrize("kind, most", [("sd1", 2), ("sdxl", 1)])
def test_a_layer_that_is_not_there_cannot_be_used(bases, kind, most):
    load(bases[kind][0], clip_skip=most)
    with pytest.raises(BaseModelError, match=f"base.clip_skip is {most + 1}"):
        load(bases[kind][0], clip_skip=most + 1)


@pytest.mark.parametrize(
    ("file", "key", "value", "said"),
    [
        ("vae/config.json", "scaling_factor", 0, "scaling_factor is 0"),
        ("vae/config.json", "scaling_factor", None, "scaling_factor is None"),
        ("vae/config.json", "latents_mean", [0.0] * 4, "each channel by itself"),
        ("vae/config.json", "norm_num_groups", 0, "damaged config of its VAE"),
        ("text_encoder/config.json", "num_attention_heads", 0, "damaged config of its text enc"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0, "num_train_timesteps is 0"),
    ],
)
def test_configs_that_make_no_sense_are_refused_in_a_sentence(
    bases, tmp_path, file, key, value, said
):
    folder = shutil.copytree(bases["sd1"][0], tmp_path / "model")
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, key: value}))
    with pytest.raises(BaseModelError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("text_encoder/config.json", "hidden_act", "gelu"),
        ("vae/config.json", "act_fn", "gelu"),
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("scheduler/scheduler_config.json", "beta_end", 0.03),
    ],
)
def test_the_fingerprint_changes_with_a_config(bases, tmp_path, file, key, value):
    folder = shutil.copytree(bases["sd1"][0], tmp_path / "model")
    before = load(folder).fingerprint()
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, key: value}))
    assert load(folder).fingerprint() != before


@pytest.mark.parametrize("name", ["models/nowhere.safetensors", "a/b.ckpt"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(name):
    with pytest.raises(BaseModelError, match=f"no base model '{name}'"):
        load_base_model(name, CPU, torch.float32)
