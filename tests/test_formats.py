"""Adapter files: what is written is what other programs read, and bad files are refused."""

import json
import os
import stat
import struct

import numpy as np
import pytest
import torch
from conftest import PROJECT, choose, make_unet, randomise
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from lora_sd import inject, layer_names
from lora_sd.durable import sha256_bytes
from lora_sd.errors import AdapterError
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.formats.kohya import keys_of
from lora_sd.formats.reading import sort_names
from lora_sd.formats.safetensors_file import read_header, write_tensors
from lora_sd.generate import PictureSettings, generate
from lora_sd.merge import MergedWeights


@pytest.fixture
def file(adapter, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(adapter, path, torch.float32)
    return path


@pytest.fixture
def shapes(unet):
    return layer_names.layer_shapes(unet)


def test_saved_and_loaded_is_the_same(adapter, file, shapes):
    again = load_adapter(file, shapes)
    assert again.layers.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        assert torch.equal(again.layers[name].down, layer.down)
        assert torch.equal(again.layers[name].up, layer.up)
        assert again.layers[name].alpha == layer.alpha


def test_keys_and_shapes_are_kohya_s(file):
    tensors = load_file(file)
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{key}.lora_down.weight"].shape == (2, 16)
    assert tensors[f"{key}.lora_up.weight"].shape == (16, 2)
    assert tensors[f"{key}.alpha"].shape == () and tensors[f"{key}.alpha"] == 2
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (3, 4, 3, 3)
    assert tensors["lora_unet_conv_in.lora_up.weight"].shape == (8, 3, 1, 1)
    assert tensors["lora_unet_conv_in.alpha"] == 1


def test_metadata_is_kohya_s_and_the_hash_is_that_of_the_tensors(file):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    data = file.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    assert metadata["sshs_model_hash"] == sha256_bytes(body)
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == "2"
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "3", "conv_alpha": "1"}


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_the_keys_of_every_layer_are_those_of_lycoris(family):
    known = json.loads((PROJECT / "tests" / "data" / "kohya_keys.json").read_text())[family]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(known["unet"])
    keys = keys_of(layer_names.layer_shapes(unet), is_sdxl=False)
    assert sorted(keys.values()) == known["lycoris_full"]


@pytest.mark.parametrize("preset", ["attention", "attention-conv", "full"])
def test_diffusers_draws_the_same_picture(base, tmp_path, preset):
    inject.attach(base.unet, choose(base.unet, preset))
    randomise(base.unet)
    adapter = inject.collect(base.unet)
    inject.detach(base.unet)
    save_adapter(adapter, tmp_path / "a.safetensors")
    settings = [PictureSettings("a red wall", seed=4, steps=4, guidance=3)]

    plain = np.asarray(generate(base, settings)[0], dtype=int)
    merged = MergedWeights({"unet": base.unet})
    merged.set(
        [(load_adapter(tmp_path / "a.safetensors", layer_names.layer_shapes(base.unet)), 1.0)]
    )
    ours = np.asarray(generate(base, settings)[0], dtype=int)
    merged.clear()
    pipeline = base.pipeline()
    pipeline.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    theirs = pipeline(
        "a red wall",
        num_inference_steps=4,
        guidance_scale=3,
        width=16,
        height=16,
        generator=torch.Generator().manual_seed(4),
    ).images[0]
    assert np.abs(ours - plain).max() > 8
    assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 1


def test_a_file_without_alpha_is_read_as_alpha_equal_rank_with_a_note(file, shapes):
    tensors = {k: v for k, v in load_file(file).items() if not k.endswith("alpha")}
    save_file(tensors, file)
    adapter = load_adapter(file, shapes)
    assert adapter.layers["unet.conv_in"].alpha == 3
    assert "no alpha" in adapter.metadata["lora_sd.note"]


def test_the_file_has_the_umask_s_mode(file):
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask


def test_values_that_are_not_finite_are_never_written(adapter, file):
    before = file.read_bytes()
    adapter.layers["unet.conv_in"].up[0] = 1e6  # infinite in float16
    with pytest.raises(AdapterError, match="not finite"):
        save_adapter(adapter, file, torch.float16)
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 20, 0.5, -1])
def test_a_truncated_file_is_refused(file, shapes, length):
    data = file.read_bytes()
    cut = int(len(data) * length) if isinstance(length, float) else length
    file.write_bytes(data[:cut])
    with pytest.raises(AdapterError, match=r"a\.safetensors' is"):
        load_adapter(file, shapes)
    with pytest.raises(AdapterError, match=r"a\.safetensors' is"):
        read_header(file)


def test_a_header_tells_names_dtypes_shapes_and_metadata(file):
    header = read_header(file)
    tensors = load_file(file)
    assert {name: entry.shape for name, entry in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert {entry.dtype for entry in header.tensors.values()} == {"F32"}
    assert header.metadata["ss_network_dim"] == "2"


HOSTILE = {
    "another model's keys": lambda t: {f"x{k}": v for k, v in t.items()},
    "one key too many": lambda t: {**t, "lora_unet_nowhere.alpha": torch.tensor(1.0)},
    "half a layer": lambda t: {
        k: v for k, v in t.items() if k != "lora_unet_conv_in.lora_up.weight"
    },
    "alpha 0": lambda t: {**t, "lora_unet_conv_in.alpha": torch.tensor(0.0)},
    "alpha NaN": lambda t: {**t, "lora_unet_conv_in.alpha": torch.tensor(torch.nan)},
    "NaN": lambda t: {**t, "lora_unet_conv_in.lora_up.weight": torch.full((8, 3, 1, 1), torch.nan)},
    "factors that do not fit": lambda t: {
        **t,
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    },
    "another shape": lambda t: {**t, "lora_unet_conv_in.lora_up.weight": torch.ones(9, 3, 1, 1)},
    "integers": lambda t: {
        **t,
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 3, 1, 1).to(torch.int8),
    },
    "a path for a name": lambda t: {**t, "../../etc/x": torch.ones(1)},
    "nothing": lambda t: {},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_with_its_name(file, shapes, kind):
    file.write_bytes(save(HOSTILE[kind](load_file(file))))
    with pytest.raises(AdapterError, match=r"a\.safetensors'") as caught:
        load_adapter(file, shapes)
    assert len(str(caught.value)) < 500


def test_names_are_judged_before_anything_else(file, shapes):
    file.write_bytes(save({**load_file(file), "<img src=x onerror=alert(1)>": torch.ones(1)}))
    with pytest.raises(AdapterError, match="strange names"):
        load_adapter(file, shapes)


def test_60_000_empty_tensors_are_refused_at_once(tmp_path, shapes):
    header = {
        f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(60_000)
    }
    text = json.dumps(header).encode()
    file = tmp_path / "many.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(AdapterError, match="60,000 tensors|not a safetensors"):
        load_adapter(file, shapes)


def test_a_pickle_is_refused_and_not_run(tmp_path, shapes):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Harmful(), tmp_path / "p.safetensors")
    with pytest.raises(AdapterError, match="not a safetensors file"):
        load_adapter(tmp_path / "p.safetensors", shapes)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_of_another_size_of_model_is_refused(file):
    with pytest.raises(AdapterError, match="another"):
        load_adapter(file, layer_names.layer_shapes(make_unet(block_out_channels=(8, 24))))


def test_a_factor_under_two_names_is_refused_whichever_comes_first(file, shapes):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    key = "lora_unet_conv_in"
    again = {f"{key}.lora_B.weight": tensors[f"{key}.lora_up.weight"] + 1}
    for both in ({**tensors, **again}, {**again, **tensors}):
        file.write_bytes(save(both))
        with pytest.raises(AdapterError, match=f"1 of its layers are there twice.*'{key}'"):
            load_adapter(file, shapes)
        partly = load_adapter(file, shapes, allow_partial=True)
        assert partly.layers.keys() == layers_of(tensors, shapes) - {"unet.conv_in"}
    assert sort_names(again.keys() | tensors.keys()).twice == {key}


def layers_of(tensors, shapes):
    keys = {name.partition(".")[0] for name in tensors}
    return {name for name, key in keys_of(shapes, False).items() if key in keys}


def test_a_layer_under_two_names_is_left_out_whole(file, shapes):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    again = {
        k.replace("lora_unet_conv_in", "lycoris_conv_in"): v + 1
        for k, v in tensors.items()
        if k.startswith("lora_unet_conv_in.")
    }
    file.write_bytes(save({**again, **tensors}))
    with pytest.raises(AdapterError, match="1 of its layers are there twice"):
        load_adapter(file, shapes)
    assert "unet.conv_in" not in load_adapter(file, shapes, allow_partial=True).layers


def test_what_could_not_be_read_again_is_not_written(file):
    before, tensors = file.read_bytes(), load_file(file)
    huge = {"ss_tag_frequency": "x" * 5_000_000, "ss_network_dim": "2"}
    with pytest.raises(AdapterError, match="header would be 5.03 MB.*'ss_tag_frequency', 5.00 MB"):
        write_tensors(file, tensors, huge)
    many = dict.fromkeys((f"t{n}" for n in range(20_001)), torch.ones(1))
    with pytest.raises(AdapterError, match="20,001 tensors"):
        write_tensors(file, many, {})
    wide = {"a": torch.zeros(1).expand(2**15, 2**13)}
    with pytest.raises(AdapterError, match="1.07 GB large"):
        write_tensors(file, wide, {})
    assert file.read_bytes() == before


def test_a_header_that_is_too_long_is_told(file, shapes):
    save_file(load_file(file), file, {"ss_tag_frequency": "x" * 5_000_000})
    with pytest.raises(AdapterError, match="header of 5.03 MB.*above 4 MiB"):
        load_adapter(file, shapes)


def test_metadata_that_is_no_unicode_is_written_as_question_marks(file):
    write_tensors(file, load_file(file), {"ss_output_name": "b\udcff"})
    assert read_header(file).metadata["ss_output_name"] == "b?"
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["ss_output_name"] == "b?"


@pytest.mark.parametrize("place", ["name", "metadata"])
def test_control_characters_of_a_header_do_not_reach_the_terminal(place, tmp_path):
    key = json.dumps("\x1b[31m")
    twice = f"{key}:0,{key}:0"
    text = f"{{{twice}}}" if place == "name" else f'{{"__metadata__":{{{twice}}}}}'
    file = tmp_path / "a.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode())
    with pytest.raises(AdapterError) as caught:
        read_header(file)
    assert r"\x1b[31m" in str(caught.value) and str(caught.value).isprintable()
