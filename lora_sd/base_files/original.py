"""Names of tensors in the original single-file layout, and in a diffusers folder.

The original layout is that of the files which model sites offer and which A1111 and ComfyUI load:
LDM's for Stable Diffusion 1 and 2, SGM's for SDXL. Sources: CompVis/latent-diffusion
(openaimodel.py, model.py), mlfoundations/open_clip (transformer.py),
Stability-AI/generative-models (encoders/modules.py).

| part | prefix |
| --- | --- |
| UNet | model.diffusion_model. |
| VAE | first_stage_model. |
| text encoder of SD 1, of SD 2 | cond_stage_model.transformer., cond_stage_model.model. |
| text encoders of SDXL | conditioner.embedders.0.transformer., conditioner.embedders.1.model. |

Below `transformer.` the names are those of transformers' CLIP, below `model.` OpenCLIP's.

A tensor of a folder is named here by its component and its key there:
'unet.conv_in.weight', 'vae.quant_conv.bias', 'text_encoder.text_model.final_layer_norm.weight'.
Three things differ by more than the name: the VAE's attention is made of 1 x 1 convolutions, and
OpenCLIP stacks q, k and v in one tensor and keeps its text projection transposed.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from lora_sd.errors import BaseModelError, shown_list
from lora_sd.formats.ldm_names import IN_RESNET, OUTSIDE_BLOCKS, unet_ldm_names

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
LDM_PLACE = re.compile(r"(input_blocks|output_blocks|middle_block)\.(?:(\d+)\.)?(\d+)\.(.+)")
# Parts of a path, without the dots around them: (folder, original).
Pairs = Sequence[tuple[str, str]]
VAE_PARTS: Pairs = (
    ("mid_block.resnets.0", "mid.block_1"),
    ("mid_block.resnets.1", "mid.block_2"),
    ("mid_block.attentions.0", "mid.attn_1"),
    ("down_blocks", "down"),
    ("up_blocks", "up"),
    ("resnets", "block"),
    ("downsamplers.0", "downsample"),
    ("upsamplers.0", "upsample"),
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
)
OPEN_CLIP_PARTS: Pairs = (
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn", "attn"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
STACKED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, and the folder's tensors that are in it.

    `kind` says how: 'same'; 'conv' (out, in, 1, 1) for a folder's (out, in); 'transposed'; or
    'stacked', several along the first axis.
    """

    key: str
    names: tuple[str, ...]
    kind: str = "same"

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The file's tensor, of the folder's."""
        if self.kind == "stacked":
            return torch.cat(list(tensors))
        (tensor,) = tensors
        if self.kind == "conv":
            return tensor[:, :, None, None]
        return tensor.T.contiguous() if self.kind == "transposed" else tensor

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The folder's tensors, of the file's."""
        if self.kind == "stacked":
            return list(tensor.chunk(len(self.names)))
        if self.kind == "conv":
            return [tensor[:, :, 0, 0]]
        return [tensor.T.contiguous() if self.kind == "transposed" else tensor]

    def joined_shape(self, shapes: Sequence[Size]) -> Size:
        """Shape of the file's tensor, of the folder's."""
        if self.kind == "stacked":
            return Size((sum(shape[0] for shape in shapes), *shapes[0][1:]))
        if self.kind == "conv":
            return Size((*shapes[0], 1, 1))
        return shapes[0][::-1] if self.kind == "transposed" else shapes[0]

    def split_shape(self, shape: Size) -> Size:
        """Shape of each of the folder's tensors, of the file's."""
        if self.kind == "stacked":
            return Size((shape[0] // len(self.names), *shape[1:]))
        if self.kind == "conv":
            return shape[:2]
        return shape[::-1] if self.kind == "transposed" else shape


def from_original(shapes: Mapping[str, Size]) -> tuple[list[Piece], list[str]]:
    """(pieces, keys that no diffusers folder has a place for) of a single file, in its order.

    The latter are such as `model_ema.*`, the noise schedule, or OpenCLIP's `logit_scale`.
    """
    unet = unet_folder_names(key.removeprefix(UNET) for key in shapes if key.startswith(UNET))
    up_blocks = _count(shapes, VAE + r"decoder\.up\.(\d+)\.")
    pieces, rest = [], []
    for key, shape in shapes.items():
        names, kind = _folder_names(key, shape, unet, up_blocks)
        if names:
            pieces.append(Piece(key, names, kind))
        else:
            rest.append(key)
    return pieces, rest


def _folder_names(
    key: str, shape: Size, unet: Mapping[str, str], up_blocks: int
) -> tuple[tuple[str, ...], str]:
    """(names, kind) of the piece of one key; no names: a folder has no place for it."""
    if key.startswith(UNET):
        name = unet.get(key.removeprefix(UNET))
        return (f"unet.{name}",) if name else (), "same"
    if key.startswith(VAE):
        path = key.removeprefix(VAE)
        if path.split(".")[0] not in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
            return (), "same"
        name = _mirror_up(_swap(path, VAE_PARTS, back=True), up_blocks)
        conv = ".mid_block.attentions." in name and len(shape) == 4
        return (f"vae.{name}",), "conv" if conv else "same"
    for prefix in CLIP:
        if key.startswith(prefix):
            path = key.removeprefix(prefix).removeprefix("text_model.")
            return (f"text_encoder.text_model.{path}",), "same"
    for prefix, component in OPEN_CLIP.items():
        if key.startswith(prefix):
            return _folder_names_of_open_clip(key.removeprefix(prefix), component)
    return (), "same"


def _folder_names_of_open_clip(path: str, component: str) -> tuple[tuple[str, ...], str]:
    name = f"{component}.{_swap(path, OPEN_CLIP_PARTS, back=True)}"
    if path == "text_projection":
        # Stable Diffusion 2 does not use it, and its folders do not have it.
        return ((name,) if component == "text_encoder_2" else ()), "transposed"
    stem, stacked, kind = name.partition(".in_proj_")
    if stacked:
        return tuple(f"{stem}.{part}.{kind}" for part in STACKED), "stacked"
    return ((name,) if name != f"{component}.{path}" else ()), "same"


def to_original(shapes: Mapping[str, Size], open_clip: bool) -> list[Piece]:
    """Pieces of the single file for a folder with these tensors.

    Args:
        open_clip: whether `text_encoder` is an OpenCLIP model, as in Stable Diffusion 2. With a
            `text_encoder_2`, the first is CLIP and the second OpenCLIP, as in SDXL.

    Raises:
        BaseModelError: the original layout has no place for some of the tensors.
    """
    unet = unet_ldm_names({_path(name[5:]) for name in shapes if name.startswith("unet.")})
    up_blocks = _count(shapes, r"vae\.decoder\.up_blocks\.(\d+)\.")
    sdxl = any(name.startswith("text_encoder_2.") for name in shapes)
    pieces, homeless = [], []
    for name, shape in shapes.items():
        component, _, key = name.partition(".")
        if component == "unet":
            path = _path(key)
            if path in unet:
                pieces.append(Piece(UNET + unet[path] + key.removeprefix(path), (name,)))
            else:
                homeless.append(name)
        elif component == "vae":
            conv = ".mid_block.attentions." in key and len(shape) == 2
            original = VAE + _swap(_mirror_up(key, up_blocks), VAE_PARTS)
            pieces.append(Piece(original, (name,), "conv" if conv else "same"))
        elif component == "text_encoder" and (sdxl or not open_clip):
            pieces.append(Piece(CLIP[sdxl] + key, (name,)))
        elif not key.endswith(".position_ids"):  # OpenCLIP has no such counter
            prefix = [*OPEN_CLIP][sdxl]
            pieces += _open_clip_pieces(prefix, component, key, shapes)
    if homeless:
        raise BaseModelError(
            f"The original single-file layout has no place for {len(homeless)} tensors, such as "
            f"{shown_list(homeless, 2)}. Save a diffusers folder instead."
        )
    return pieces


def _open_clip_pieces(
    prefix: str, component: str, key: str, shapes: Mapping[str, Size]
) -> list[Piece]:
    """The piece of one tensor of an OpenCLIP text encoder; none for k and v, which q brings."""
    original = prefix + _swap(key, OPEN_CLIP_PARTS)
    if key == "text_projection.weight":
        return [Piece(original, (f"{component}.{key}",), "transposed")]
    part = key.split(".")[-2]
    if part not in STACKED:
        return [Piece(original, (f"{component}.{key}",))]
    names = tuple(f"{component}.{key.replace(part, one)}" for one in STACKED)
    missing = [name for name in names if name not in shapes]
    if missing:
        raise BaseModelError(f"The base model lacks {shown_list(missing)}.")
    stacked = original.replace(f"{part}.", "in_proj_")
    return [Piece(stacked, names, "stacked")] if part == STACKED[0] else []


def unet_folder_names(keys: Iterable[str]) -> dict[str, str]:
    """{original key: diffusers' key} of a UNet's tensors, both without prefix.

    The other direction is `ldm_names.unet_ldm_names`. A key that such a UNet has not is left out.
    """
    keys = list(keys)
    outside = {ldm: path for path, ldm in OUTSIDE_BLOCKS.items()}
    inside = [("op", "conv"), *((ldm, path) for path, ldm in IN_RESNET.items())]
    roots = _unet_roots(keys)
    names = {}
    for key in keys:
        path, place = _path(key), LDM_PLACE.fullmatch(key)
        if path in outside:
            names[key] = outside[path] + key.removeprefix(path)
        elif place and (root := roots.get(key.removesuffix(f".{place[4]}"))):
            names[key] = f"{root}.{_swap(place[4], inside)}"
    return names


def _unet_roots(keys: Iterable[str]) -> dict[str, str]:
    """{'input_blocks.1.1': 'down_blocks.0.attentions.0'}: a block ends at its resampling layer."""
    heads: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    for key in keys:
        if place := LDM_PLACE.fullmatch(key):
            heads[place[1], int(place[2] or 0), int(place[3])].add(place[4].split(".")[0])
    roots = {}
    for side, number, index in sorted(heads):
        if side == "middle_block":
            part = "resnets" if "in_layers" in heads[side, number, index] else "attentions"
            roots[f"middle_block.{index}"] = f"mid_block.{part}.{index // 2}"
    for side, name, first in (("input_blocks", "down", 1), ("output_blocks", "up", 0)):
        block = layer = 0
        for number in sorted({n for s, n, _ in heads if s == side and n >= first}):
            resampled = False
            for index in sorted(i for s, n, i in heads if (s, n) == (side, number)):
                if heads[side, number, index] & {"op", "conv"}:
                    part, resampled = f"{name}samplers.0", True
                else:
                    part = f"{'attentions' if index else 'resnets'}.{layer}"
                roots[f"{side}.{number}.{index}"] = f"{name}_blocks.{block}.{part}"
            block, layer = (block + 1, 0) if resampled else (block, layer + 1)
    return roots


def _path(key: str) -> str:
    """A tensor's key without its last part: the module that has it."""
    return key.rpartition(".")[0]


def _swap(path: str, pairs: Pairs, back: bool = False) -> str:
    """The path with each pair's first part, where it has it, replaced by the second."""
    dotted = f".{path}."
    for pair in pairs:
        old, new = reversed(pair) if back else pair
        dotted = dotted.replace(f".{old}.", f".{new}.")
    return dotted[1:-1]


def _count(names: Iterable[str], pattern: str) -> int:
    """One more than the highest number that the pattern finds."""
    return 1 + max(
        (int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1
    )


def _mirror_up(path: str, up_blocks: int) -> str:
    """The path with the decoder's blocks counted from the other end."""
    return re.sub(r"(?<=\.up_blocks\.)\d+", lambda found: str(up_blocks - 1 - int(found[0])), path)
