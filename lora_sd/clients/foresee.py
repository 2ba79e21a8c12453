"""What the clients will do with the layers of an adapter that is not trained yet."""

from collections.abc import Iterable

import torch
from torch import Size

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.clients.judge import check
from lora_sd.clients.outline import Outline, outline_of
from lora_sd.clients.report import ClientReport
from lora_sd.clients.sentences import layer_of_keys, sentences, unused_layers
from lora_sd.formats import diffusers, kohya
from lora_sd.formats.client_rules import with_whole_attention
from lora_sd.formats.layer_tables import FAMILIES, layer_shapes
from lora_sd.layers import magnitude_shape

ANY_SHAPE = Size((8, 8))


def ignored(
    names: Iterable[str], family: str, format: str, up_bias: bool = False, dora: str = "off"
) -> dict[str, list[str]]:
    """{client: those of the layers that it will ignore, or refuse to load}; none: left out.

    Args:
        names: full layer names.
        family: 'sd15', 'sd21', 'sdxl', 'tiny-sd', or any other word for an unknown model.
        format: 'kohya' or 'diffusers'.
        up_bias: whether the layers have up-biases.
        dora: whether they have DoRA's norms, and of which side: 'off', 'input' or 'output'.
    """
    wanted = list(names)
    reports, layer_of = _foresee(wanted, family, format, up_bias, dora)
    in_file = set(layer_of.values())
    lost = {}
    for client, report in reports.items():
        unused = set(unused_layers(report, layer_of))
        lost[client] = [name for name in wanted if name in unused or name not in in_file]
    return {client: layers for client, layers in lost.items() if layers}


def ignored_layers(
    names: Iterable[str], family: str, format: str, up_bias: bool = False, dora: str = "off"
) -> list[str]:
    """The same in sentences for a person: 'In kohya's tools 4 of 282 layers are ignored: ...'."""
    reports, layer_of = _foresee(list(names), family, format, up_bias, dora)
    return sentences(reports.values(), layer_of)


def _foresee(
    names: list[str], family: str, format: str, up_bias: bool, dora: str
) -> tuple[dict[str, ClientReport], dict[str, str]]:
    """(each client's report, {key: full layer name}) of the file that would be written."""
    known = layer_shapes(family) if family in FAMILIES else {}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"} if family == "sdxl" else {}
    # Of an unknown model only the names count, so that any shape will do.
    layers = {name: _empty(name, known.get(name, ANY_SHAPE), up_bias, dora) for name in names}
    adapter, _ = with_whole_attention(Adapter(layers, metadata), need_one=format == "diffusers")
    shapes = {name: layer.weight_shape for name, layer in adapter.layers.items()}
    outline = _outline(adapter, format)
    reports = check(outline, family, {**known, **shapes})
    return reports, layer_of_keys(outline.shapes, {**known, **shapes})


def _outline(adapter: Adapter, format: str) -> Outline:
    if format == "kohya":
        return outline_of(kohya.to_tensors(adapter, torch.float16), adapter.metadata)
    metadata = {**adapter.metadata, diffusers.CONFIG_KEY: diffusers.lora_config(adapter)}
    return outline_of(diffusers.to_tensors(adapter, torch.float16), metadata)


def _empty(name: str, shape: Size, up_bias: bool, dora: str) -> LoRAWeights:
    """Factors of rank 1 without storage."""
    embedding = name.endswith("token_embedding")
    rows, columns = (shape[1], shape[:1]) if embedding else (shape[0], shape[1:])
    ones = (1,) * (len(shape) - 2)
    with torch.device("meta"):
        bias = torch.empty(rows) if up_bias and not embedding else None
        down, up = torch.empty(1, *columns), torch.empty(rows, 1, *ones)
        norms = None
        if dora != "off" and not embedding:
            norms = torch.empty(magnitude_shape(shape, dora))
    return LoRAWeights(down, up, 1.0, bias, norms, embedding)
