"""What the clients will do with an adapter that is not trained yet."""

import torch

from lora_sd.adapter import Adapter
from lora_sd.clients.judge import check
from lora_sd.clients.outline import Outline, outline_of
from lora_sd.clients.report import ClientReport
from lora_sd.clients.sentences import layer_of_keys, sentences, unused_layers
from lora_sd.formats import diffusers, kohya
from lora_sd.formats.client_rules import with_whole_attention
from lora_sd.formats.layer_tables import FAMILIES, layer_shapes


def ignored(adapter: Adapter, family: str, format: str) -> dict[str, list[str]]:
    """{client: those of the layers that it will ignore, or refuse to load}; none: left out.

    Args:
        adapter: the planned one (`layer_choice.planned_adapter`); only its shapes are looked at.
        family: 'sd15', 'sd21', 'sdxl', 'tiny-sd', or any other word for an unknown model.
        format: 'kohya' or 'diffusers'.
    """
    reports, layer_of = _foresee(adapter, family, format)
    in_file = set(layer_of.values())
    lost = {}
    for client, report in reports.items():
        unused = set(unused_layers(report, layer_of))
        lost[client] = [name for name in adapter.layers if name in unused or name not in in_file]
    return {client: layers for client, layers in lost.items() if layers}


def ignored_layers(adapter: Adapter, family: str, format: str) -> list[str]:
    """The same in sentences for a person: 'In kohya's tools 4 of 282 layers are ignored: ...'."""
    reports, layer_of = _foresee(adapter, family, format)
    return sentences(reports.values(), layer_of)


def _foresee(
    adapter: Adapter, family: str, format: str
) -> tuple[dict[str, ClientReport], dict[str, str]]:
    """(each client's report, {key: full layer name}) of the file that would be written."""
    known = layer_shapes(family) if family in FAMILIES else {}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"} if family == "sdxl" else {}
    adapter, _ = with_whole_attention(Adapter(adapter.layers, metadata), format)
    shapes = {name: layer.weight_shape for name, layer in adapter.layers.items()}
    outline = _outline(adapter, format)
    reports = check(outline, family, {**known, **shapes})
    return reports, layer_of_keys(outline.shapes, {**known, **shapes})


def _outline(adapter: Adapter, format: str) -> Outline:
    if format == "kohya":
        return outline_of(kohya.to_tensors(adapter, torch.float16), adapter.metadata)
    metadata = {**adapter.metadata, diffusers.CONFIG_KEY: diffusers.lora_config(adapter)}
    return outline_of(diffusers.to_tensors(adapter, torch.float16), metadata)
