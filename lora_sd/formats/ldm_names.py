"""Names of UNet layers in the original (LDM, SGM) checkpoints, from diffusers' names.

Both number the same blocks: LDM counts residual blocks and resamplers through in `input_blocks` and
`output_blocks`, diffusers counts within each block. Source: the U-Net of CompVis/latent-diffusion
(openaimodel.py); SDXL's layout adds `label_emb`. kohya's SDXL adapters are written in these names.
"""

import re
from collections.abc import Iterable

OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PLACE = re.compile(
    r"(?P<block>down_blocks|up_blocks|mid_block)(?:\.(?P<number>\d+))?"
    r"\.(?P<part>resnets|attentions|downsamplers|upsamplers)\.(?P<index>\d+)\.(?P<rest>.+)"
)


def unet_ldm_names(paths: Iterable[str]) -> dict[str, str]:
    """{diffusers path: LDM path below 'model.diffusion_model.'} of a UNet's modules.

    'mid_block.resnets.0.conv1' becomes 'middle_block.0.in_layers.2'. The layout, which the numbers
    depend on, is read off the paths, so they should be those of a whole UNet, with or without its
    norms. Every block has the same number of layers. A path that LDM has no name for is left out.
    """
    places = {path: PLACE.fullmatch(path) for path in paths}
    found = [place for place in places.values() if place]
    per_block = _layers_per_block(found)
    with_attention = {place["number"] for place in found if _is_up_attention(place)}
    names = {}
    for path, place in places.items():
        if place is None:
            name = OUTSIDE_BLOCKS.get(path)
        else:
            name = _name_in_block(place, per_block, place["number"] in with_attention)
        if name is not None:
            names[path] = name
    return names


def _layers_per_block(places: list[re.Match[str]]) -> int:
    """Residual blocks of a down block; an up block has one more."""
    counted = [
        int(place["index"]) + (place["block"] == "down_blocks")
        for place in places
        if place["block"] != "mid_block" and place["part"] in ("resnets", "attentions")
    ]
    return max(counted, default=1)


def _is_up_attention(place: re.Match[str]) -> bool:
    return place["block"] == "up_blocks" and place["part"] == "attentions"


def _name_in_block(place: re.Match[str], per_block: int, up_attention: bool) -> str | None:
    """LDM's name of a module in a block; `up_attention`: whether the up block has attention."""
    part, index, rest = place["part"], int(place["index"]), place["rest"]
    if part == "resnets":
        first, dot, deeper = rest.partition(".")
        rest = IN_RESNET.get(first, first) + dot + deeper
    if place["block"] == "mid_block":
        return f"middle_block.{2 * index + (part == 'attentions')}.{rest}"
    number = int(place["number"]) * (per_block + 1)
    if part == "downsamplers":
        return f"input_blocks.{number + per_block + 1}.0.op" if rest == "conv" else None
    if part == "upsamplers":
        return f"output_blocks.{number + per_block}.{1 + up_attention}.{rest}"
    if place["block"] == "down_blocks":
        return f"input_blocks.{number + index + 1}.{int(part == 'attentions')}.{rest}"
    return f"output_blocks.{number + index}.{int(part == 'attentions')}.{rest}"
