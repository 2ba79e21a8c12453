"""LDM names are those of ComfyUI's key tables, and of diffusers' own conversion for any layout."""

import pytest
import torch
from conftest import make_unet
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from make_adapters import make_sdxl_unet

from lora_sd.clients.tables import load_tables
from lora_sd.formats.ldm_names import unet_ldm_names

LAYOUTS = {
    "one layer a block": lambda: make_unet(),
    "two layers a block": lambda: make_unet(layers_per_block=2),
    "three blocks": lambda: make_unet(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    ),
    "SDXL's": make_sdxl_unet,
    "SDXL's, one layer a block": lambda: make_sdxl_unet(layers_per_block=1),
}


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_every_module_has_the_name_that_comfyui_gives_it(family):
    tables = load_tables(family)
    paths = tables.modules["unet"]
    names = unet_ldm_names(paths)
    assert names.keys() == paths.keys()
    for path, name in names.items():
        target = tables.comfy["lora_unet_" + path.replace(".", "_")]
        assert target.weight.endswith(f"diffusion_model.{name}.weight"), path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_converts_them_back(layout):
    unet = LAYOUTS[layout]()
    weights = unet.state_dict()
    names = unet_ldm_names({key.rpartition(".")[0] for key in weights})
    checkpoint = {}
    for number, key in enumerate(weights):
        path, _, kind = key.rpartition(".")
        checkpoint[f"model.diffusion_model.{names[path]}.{kind}"] = torch.tensor(number)
    again = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert {key: int(number) for key, number in again.items()} == {
        key: number for number, key in enumerate(weights)
    }


def test_a_few_layers_tell_the_layout_too():
    every = unet_ldm_names(f"{name}" for name, _ in make_sdxl_unet().named_modules())
    attention = [path for path in every if path.endswith("attn1.to_q")]
    assert unet_ldm_names(attention) == {path: every[path] for path in attention}


def test_unknown_paths_are_left_out():
    assert unet_ldm_names(["conv_in", "somewhere.else"]) == {"conv_in": "input_blocks.0.0"}
