"""Adapters of random weights for any shapes, and a miniature of SDXL's UNet."""

from collections.abc import Mapping

import torch
from conftest import make_unet
from diffusers import UNet2DConditionModel
from torch import Size

from lora_sd.adapter import Adapter, LoRAWeights

TOKENS = "token_embedding"


def random_layer(
    shape: Size, rank: int, alpha: float, dora: bool = False, bias: bool = False
) -> LoRAWeights:
    """Factors for a base weight of that shape."""
    kernel = [1] * (len(shape) - 2)
    return LoRAWeights(
        torch.randn(rank, *shape[1:]) / 8,
        torch.randn(shape[0], rank, *kernel) / 8,
        alpha,
        torch.randn(shape[0]) if bias else None,
        torch.rand(shape[0], 1, *kernel) + 0.5 if dora else None,
    )


def random_adapter(
    shapes: Mapping[str, Size],
    ranks: tuple[int, ...] = (2,),
    alphas: tuple[float, ...] = (1.0,),
    dora: bool = False,
    bias: bool = False,
) -> Adapter:
    """Factors for every layer but the token table, going through the ranks and alphas in turn."""
    torch.manual_seed(3)
    names = [name for name in shapes if not name.endswith(TOKENS)]
    return Adapter(
        {
            name: random_layer(
                shapes[name], ranks[n % len(ranks)], alphas[n % len(alphas)], dora, bias
            )
            for n, name in enumerate(names)
        }
    )


def token_layer(shape: Size, rank: int = 2, alpha: float = 1.0) -> LoRAWeights:
    """Factors for a token table (tokens, width)."""
    torch.manual_seed(4)
    down, up = torch.randn(rank, shape[0]) / 8, torch.randn(shape[1], rank) / 8
    return LoRAWeights(down, up, alpha, embedding=True)


def make_sdxl_unet(**changes: object) -> UNet2DConditionModel:
    """A small UNet built as SDXL's: blocks of several transformers, and `add_embedding`."""
    options: dict[str, object] = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 32,
    }
    return make_unet(**{**options, **changes})


def assert_same_layers(one: Adapter, other: Adapter) -> None:
    """Every layer has the same tensors and the same alpha."""
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        again = other.layers[name]
        assert again.alpha == layer.alpha, name
        for part in ("down", "up", "up_bias", "magnitude"):
            mine, theirs = getattr(layer, part), getattr(again, part)
            assert (mine is None) == (theirs is None), (name, part)
            assert mine is None or torch.equal(mine, theirs), (name, part)
