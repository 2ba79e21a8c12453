"""A1111: keys of kohya's format looked up among its modules; what it lacks is left out silently.

A key that matches a module which takes no LoRA, or a matched layer that is not whole, makes it
refuse the file. Text encoders of SD 2.1 and SDXL's second one run in OpenCLIP, whose attention is
one module with four projections: it is adapted when all four are in the file.
"""

import math

from lora_sd.clients.fits import product_error
from lora_sd.clients.outline import Outline, Shape, is_by_output, is_other_kind
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import A1111Layer, Tables

PAIRS = (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight"))
REFUSED = "the whole network is not loaded"


def check(outline: Outline, tables: Tables) -> ClientReport:
    """What A1111 would do with a file."""
    report = ClientReport.of("a1111", outline)
    matched: dict[str, tuple[str, dict[str, str], A1111Layer]] = {}
    misfits: dict[str, str] = {}  # by prefix
    for prefix, parts in outline.layers().items():
        if prefix == "bundle_emb":
            report.matched.update(parts.values())
            continue
        layer = tables.a1111.get(prefix)
        if layer is None:
            continue
        pair = next((pair for pair in PAIRS if set(pair) <= set(parts)), None)
        shapes = {part: outline.shapes[key] for part, key in parts.items()}
        refusal = _refusal(layer, pair, shapes)
        if refusal:
            report.fatal.append(f"{prefix}: {refusal}: {REFUSED}")
            continue
        if pair and "dora_scale" in shapes and is_by_output(shapes["dora_scale"], shapes[pair[0]]):
            report.warnings.append(f"{prefix}: DoRA's norms of each output are taken for inputs'")
        if pair and layer.shape:
            mid = shapes.get("lora_mid.weight")
            error = product_error(shapes[pair[0]], shapes[pair[1]], layer.shape, mid)
            if error:
                misfits[prefix] = f"{prefix}: {error}"
        read = _parts_read(pair, parts)
        for part, key in parts.items():
            if part in read:
                report.matched.add(key)
            else:
                report.ignored[key] = "matched, not read by this module type (no message)"
        matched[layer.layer] = (prefix, parts, layer)
    for prefix, parts in _partial_attentions(matched):
        misfits.pop(prefix, None)
        for key in parts.values():
            report.matched.discard(key)
            report.ignored[key] = (
                "OpenCLIP attention needs q_proj, k_proj, v_proj and out_proj together; otherwise "
                "never applied, no message"
            )
    report.shape_errors += misfits.values()
    return report


def _refusal(
    layer: A1111Layer, pair: tuple[str, str] | None, shapes: dict[str, Shape]
) -> str | None:
    """Why a matched layer makes A1111 refuse the file, if it does."""
    if pair is None:
        norm = "w_norm" in shapes and "b_norm" in shapes
        if "diff" in shapes or norm or any(map(is_other_kind, shapes)):
            return None
        return f"no module type takes {sorted(shapes)} (AssertionError)"
    if not layer.takes_lora:
        return f"matches a {layer.kind}, on which LoRA raises"
    up, down = shapes[pair[0]], shapes[pair[1]]
    if layer.kind == "Conv2d" and layer.shape:
        if len(up) > 1 and math.prod(up) != up[0] * up[1]:
            return f"lora_up {up} is not 1x1 (reshape RuntimeError)"
        kernel = layer.shape[2:]
        if len(down) == 4 and down[2:] != (1, 1) and down[2:] != kernel:
            return f"lora_down kernel {down[2:]} is not the module's {kernel}"
    return None


def _parts_read(pair: tuple[str, str] | None, parts: dict[str, str]) -> set[str]:
    if pair:
        return {*pair, "lora_mid.weight", "alpha", "scale", "dora_scale", "bias"}
    if "diff" in parts:
        return {"diff", "diff_b", "alpha", "scale", "bias"}
    if "w_norm" in parts:
        return {"w_norm", "b_norm"}
    return set(parts)


def _partial_attentions(
    matched: dict[str, tuple[str, dict[str, str], A1111Layer]],
) -> list[tuple[str, dict[str, str]]]:
    """(prefix, parts) of each layer of an OpenCLIP attention that lacks another projection."""
    attentions: dict[str, dict[str, tuple[str, dict[str, str]]]] = {}
    for name, (prefix, parts, layer) in matched.items():
        if layer.projection:
            attention = attentions.setdefault(name.rsplit("_", 2)[0], {})
            attention[layer.projection] = (prefix, parts)
    return [layer for found in attentions.values() if len(found) < 4 for layer in found.values()]
