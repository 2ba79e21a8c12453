"""InvokeAI: first tells the base model from the file's shapes, then looks each layer up.

A file whose base it cannot tell, or tells wrongly, cannot be used with that base.
"""

import re

from lora_sd.clients.fits import product_error
from lora_sd.clients.outline import Outline, is_by_output, is_other_kind
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import TABLES, Tables

FAMILY_OF_WIDTH = {768: "sd15", 1024: "sd21", 1280: "sdxl", 2048: "sdxl"}
ALWAYS_READ = {
    "alpha", "bias_indices", "bias_values", "bias_size", "lora_up.weight", "lora_down.weight",
    "lora_mid.weight", "dora_scale",
}  # fmt: skip
READ_WITHOUT_UP = {"w_norm", "b_norm", "diff", "diff_b"}
KINDS = (
    "dora_scale", "lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "on_input",
    "w_norm",
)  # fmt: skip
WIDTH_PARTS = ("lora_down.weight", "hada_w1_b", "hada_w2_b", "diff")
SDXL_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")
LDM_PARTS = (
    "input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_0",
    "out_2",
)  # fmt: skip
TRANSFORMER_BLOCK = re.compile(
    r"^lora_unet_(?:(?:down_blocks|up_blocks)_\d+_attentions_\d+|mid_block_attentions_\d+"
    r"|(?:input_blocks|output_blocks)_\d+_\d+|middle_block_\d+)_transformer_blocks_(\d+)_"
)


def check(outline: Outline, tables: Tables) -> ClientReport:
    """What InvokeAI would do with a file."""
    report = ClientReport.of("invoke", outline)
    for key in outline.shapes:
        if key.startswith("bundle_emb"):
            report.ignored[key] = "stripped by the loader"
    if tables.family in TABLES:
        _tell_base(report, outline, tables.family)
    namings = set()
    for prefix, parts in outline.layers().items():
        if prefix.startswith("bundle_emb"):
            continue
        if tables.is_sdxl and not prefix.startswith(SDXL_PREFIXES):
            report.fatal.append(
                f"unrecognised SDXL key prefix {prefix}: ValueError, nothing is loaded"
            )
            continue
        half = "lora_up.weight" in parts and "lora_down.weight" not in parts
        if half or not any(kind in parts for kind in KINDS):
            report.fatal.append(
                f"{prefix}: unsupported layer {sorted(parts)[:4]}: ValueError, nothing is loaded"
            )
            continue
        if tables.is_sdxl and prefix.startswith("lora_unet_"):
            is_ldm = prefix.removeprefix("lora_unet_").startswith(LDM_PARTS)
            namings.add("LDM" if is_ldm else "diffusers")
        if prefix in tables.invoke:
            _layer(report, outline, tables, prefix, parts)
    if len(namings) > 1:
        report.fatal.append(
            "LDM and diffusers UNet names mixed in one SDXL file: ValueError 'could only be "
            "partially converted'"
        )
    return report


def _layer(
    report: ClientReport, outline: Outline, tables: Tables, prefix: str, parts: dict[str, str]
) -> None:
    """Judge a layer that the model has."""
    has_up = "lora_up.weight" in parts
    read = ALWAYS_READ if has_up else ALWAYS_READ | READ_WITHOUT_UP
    for part, key in parts.items():
        if part in read or is_other_kind(part):
            report.matched.add(key)
        else:
            report.ignored[key] = "warning 'Unexpected keys found in LoRA/LyCORIS layer'"
    if has_up:
        shapes = {part: outline.shapes[key] for part, key in parts.items()}
        up, down, mid = (shapes.get(f"lora_{part}.weight") for part in ("up", "down", "mid"))
        assert up is not None and down is not None
        if "dora_scale" in shapes and is_by_output(shapes["dora_scale"], up):
            report.warnings.append(f"{prefix}: DoRA's norms of each output are taken for inputs'")
        error = product_error(up, down, tables.invoke[prefix], mid)
        if error:
            report.shape_errors.append(f"{prefix}: {error}")


def _tell_base(report: ClientReport, outline: Outline, family: str) -> None:
    width = _probed_width(outline)
    told = FAMILY_OF_WIDTH.get(width) if width is not None else None
    if width is None and any(
        (found := TRANSFORMER_BLOCK.match(key)) and int(found[1]) >= 2 for key in outline.shapes
    ):
        told = "sdxl"
    if told is None:
        report.fatal.append(
            "InvokeAI cannot tell the base model (it needs attn2_to_k/to_v, a text encoder "
            "self_attn key or time_emb_proj): the file is not identified as a LoRA of a known base"
        )
    elif told != family:
        report.fatal.append(f"InvokeAI takes the file for {told} (width {width}), not {family}")


def _probed_width(outline: Outline) -> int | None:
    """The width that gives the base away: the first one found, in the file's order."""
    first = second = None
    for key, shape in outline.shapes.items():
        part = key.partition(".")[2]
        width = shape[1] if part in WIDTH_PARTS and len(shape) > 1 else None
        found = None
        if key.startswith("lora_unet_") and (
            "_attn2_to_k." in key or "_attn2_to_v." in key or "time_emb_proj.lora_down" in key
        ):
            found = width
        elif key.startswith("lora_te") and "_self_attn_" in key:
            if key.startswith("lora_te_"):
                found = width
            elif key.startswith("lora_te1_"):
                first = width  # any key sets it, so an alpha makes InvokeAI forget it
            elif key.startswith("lora_te2_"):
                second = width
        if first is not None and second is not None:
            found = first + second
        if found is not None:
            return found
    return None
