"""Every client's rules over one file."""

from collections.abc import Mapping

from torch import Size

from lora_sd.clients import a1111, comfy, diffusers, invoke, kohya
from lora_sd.clients.outline import Outline
from lora_sd.clients.report import ClientReport
from lora_sd.clients.stand_in import stand_in_tables
from lora_sd.clients.tables import TABLES, load_tables
from lora_sd.formats.layer_tables import layer_shapes


def check(
    outline: Outline, family: str, shapes: Mapping[str, Size] | None = None
) -> dict[str, ClientReport]:
    """What each client does with a file: {client: report}, in the order of `report.TITLES`.

    Args:
        family: 'sd15', 'sd21', 'sdxl', 'tiny-sd', or any other word for a model of unknown shapes.
        shapes: weight shape of each layer of a model of unknown shapes; by them and SD 1.5's
            naming rules the clients are judged then.
    """
    if family in TABLES:
        tables = load_tables(family)
    else:
        tables = stand_in_tables(family, layer_shapes(family) if shapes is None else shapes)
    return {
        "comfy": comfy.check(outline, tables, "comfy"),
        "forge": comfy.check(outline, tables, "forge"),
        "a1111": a1111.check(outline, tables),
        "invoke": invoke.check(outline, tables),
        "diffusers": diffusers.check(outline, tables),
        "kohya": kohya.check_kohya(outline, tables),
        "lycoris": kohya.check_lycoris(outline, tables),
    }
