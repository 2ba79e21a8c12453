"""What A1111, Forge, ComfyUI, InvokeAI, kohya's tools, LyCORIS and diffusers do with a file."""

from lora_sd.clients import a1111, comfy, diffusers, invoke, kohya
from lora_sd.clients.header import Header
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import load_tables


def check(header: Header, family: str) -> dict[str, ClientReport]:
    """What each client does with a file, client -> report (`report.TITLES` names them)."""
    tables = load_tables(family)
    return {
        "comfy": comfy.check(header, tables, "comfy"),
        "forge": comfy.check(header, tables, "forge"),
        "a1111": a1111.check(header, tables),
        "invoke": invoke.check(header, tables),
        "diffusers": diffusers.check(header, tables),
        "kohya": kohya.check_kohya(header, tables),
        "lycoris": kohya.check_lycoris(header, tables),
    }
