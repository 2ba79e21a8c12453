"""What is trained in a cell of the table: a UNet, layers, a batch, a device, a precision."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lora_sd.base_loading import load_base_model
from lora_sd.known_bases import published_configs

EMBEDDED = "tiny-sd"
CAPTION_TOKENS = 77
PRESETS = ("attention", "attention-conv")
_MINIATURE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
MINIATURES: dict[str, dict[str, Any]] = {
    "miniature": _MINIATURE,
    "miniature-xl": {
        **_MINIATURE,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
}
"""UNets of 40 thousand weights, with every kind of layer, to try the benchmark itself on."""


@dataclass(frozen=True)
class Case:
    """A cell of the table.

    Attributes:
        unet: 'sd15' or 'sdxl', of the published shapes with random weights; 'tiny-sd', the
            embedded base with its own; or one of `MINIATURES`.
        latents_px: the side of the square latents.
        dtype: of the frozen weights. The adapter learns in float32; with another dtype the
            trainers compute under autocast, as they do in training.
        compile: 'inductor', another backend of torch.compile, or '': not at all.
    """

    name: str
    unet: str
    preset: str
    batch: int
    latents_px: int
    rank: int = 16
    device: str = "cpu"
    dtype: str = "float32"
    compile: str = ""


def cpu_cases() -> list[Case]:
    """The step on the CPU: the size of Stable Diffusion 1.5, and the embedded base."""
    return [
        Case(f"{name}, {preset}", unet, preset, batch, latents_px)
        for name, unet, batch, latents_px in (
            ("SD1.5 256 px batch 1", "sd15", 1, 32),
            ("embedded base batch 8", EMBEDDED, 8, 16),
        )
        for preset in PRESETS
    ]


def gpu_cases(rehearse: bool = False) -> list[Case]:
    """The step on a GPU, in bfloat16, eager and compiled.

    Args:
        rehearse: the same list, of miniatures on the CPU, and compiled without a compiler.
    """
    return [
        Case(
            f"{name} px batch {batch} bf16{compiled and ' compiled'}, {preset}",
            f"miniature{unet.removeprefix('sd').removeprefix('15') and '-xl'}"
            if rehearse
            else unet,
            preset,
            batch,
            8 if rehearse else latents_px,
            rank=2 if rehearse else 16,
            device="cpu" if rehearse else "cuda",
            dtype="bfloat16",
            compile=("eager" if rehearse else "inductor") if compiled else "",
        )
        for name, unet, batches, latents_px in (
            ("SD1.5 512", "sd15", (1, 4, 8), 64),
            ("SDXL 1024", "sdxl", (1,), 128),
        )
        for batch in batches
        for compiled in ("", "compiled")
        for preset in PRESETS
    ]


def miniature_case(preset: str = "attention-conv", **changes: Any) -> Case:
    """The smallest step on the CPU, to try the benchmark itself on."""
    options = {"name": "miniature", "unet": "miniature", "batch": 1, "latents_px": 8, "rank": 2}
    return Case(**{**options, "preset": preset, **changes})


def build_unet(case: Case) -> UNet2DConditionModel:
    """The frozen UNet of a case, in training mode, on its device."""
    device, dtype = torch.device(case.device), getattr(torch, case.dtype)
    torch.manual_seed(0)
    if case.unet == EMBEDDED:
        unet = load_base_model(EMBEDDED, device, dtype).unet
    else:
        config = MINIATURES.get(case.unet) or published_configs(case.unet)["unet"]
        with torch.device(device):
            unet = UNet2DConditionModel.from_config(config).to(dtype)
    return unet.requires_grad_(False).train()


@dataclass(frozen=True)
class Inputs:
    """What goes into a UNet, and what should come out: random, the same for every side.

    Attributes:
        latents, target: (batch, channels, side, side).
        timesteps: (batch).
        captions: (batch, tokens, width).
        further: SDXL's 'text_embeds' and 'time_ids', or nothing.
    """

    latents: Tensor
    target: Tensor
    timesteps: Tensor
    captions: Tensor
    further: dict[str, Tensor]


def make_inputs(case: Case, config: Any) -> Inputs:
    """Inputs that fit the UNet of this config, in the case's dtype."""
    draw = torch.Generator().manual_seed(1)
    to: dict[str, Any] = {"device": case.device, "dtype": getattr(torch, case.dtype)}
    shape = (case.batch, config.in_channels, case.latents_px, case.latents_px)
    further = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        further = {
            "text_embeds": torch.randn(case.batch, pooled, generator=draw).to(**to),
            "time_ids": torch.tensor([[1024, 1024, 0, 0, 1024, 1024]] * case.batch).to(**to),
        }
    return Inputs(
        torch.randn(shape, generator=draw).to(**to),
        torch.randn(shape, generator=draw).to(**to),
        torch.randint(1000, (case.batch,), generator=draw).to(case.device),
        torch.randn(case.batch, CAPTION_TOKENS, config.cross_attention_dim, generator=draw).to(
            **to
        ),
        further,
    )
