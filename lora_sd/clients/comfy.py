"""ComfyUI and Forge: a key map from every known name to a weight; what it lacks is left out.

Both multiply lora_up and lora_down and add the product to the weight that the name stands for.
Forge refuses a file of which more than 12 keys match nothing.
"""

from lora_sd.clients.fits import flattened, product_error
from lora_sd.clients.outline import Outline, is_by_output
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import Tables, Target

PAIRS = (
    (".lora_up.weight", ".lora_down.weight", ".lora_mid.weight"),
    ("_lora.up.weight", "_lora.down.weight", None),
    (".lora_B.weight", ".lora_A.weight", None),
    (".lora.up.weight", ".lora.down.weight", None),
    (".lora_B", ".lora_A", None),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", None),
    (".lora_B.default.weight", ".lora_A.default.weight", None),
)
NOT_IN_FORGE = (".lora_B", ".lora_B.default.weight")
SCALARS = (".alpha", ".dora_scale")
REPLACEMENTS = (".diff", ".w_norm", ".set_weight")
OTHER_KINDS = (
    ".reshape_weight", ".rescale", ".oft_blocks", ".a1.weight", ".a2.weight", ".b1.weight",
    ".b2.weight", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2",
    ".lokr_w1", ".lokr_w2", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2",
)  # fmt: skip
ENDINGS = (
    *(ending for pair in PAIRS for ending in pair if ending),
    *SCALARS, *REPLACEMENTS, *OTHER_KINDS, ".b_norm", ".diff_b",
)  # fmt: skip
WITHOUT_BIAS = ("to_q.weight", "to_k.weight", "to_v.weight", "text_projection.weight")
FORGE_PATIENCE = 12


def check(outline: Outline, tables: Tables, client: str) -> ClientReport:
    """What 'comfy' or 'forge' would do with a file."""
    targets = tables.comfy if client == "comfy" else tables.forge
    report = ClientReport.of(client, outline)
    layers = _layers(outline, targets)
    for prefix, parts in layers.items():
        target = targets[prefix]
        acts = _pair(report, outline, prefix, parts, target)
        acts |= _replacement(report, outline, prefix, parts, target)
        others = [parts[ending] for ending in parts if ending in OTHER_KINDS]
        report.matched.update(others)
        if not acts and not others:
            for key in (parts[ending] for ending in SCALARS if ending in parts):
                report.matched.discard(key)
                report.ignored[key] = "no up/down beside it"
    if client == "forge":
        _lose_patience(report, [targets[prefix] for prefix in layers])
    return report


def _layers(outline: Outline, targets: dict[str, Target]) -> dict[str, dict[str, str]]:
    """{known prefix: {ending: key}} in the file's order."""
    layers: dict[str, dict[str, str]] = {}
    for key in outline.shapes:
        for ending in ENDINGS:
            if key.endswith(ending) and key[: -len(ending)] in targets:
                layers.setdefault(key[: -len(ending)], {})[ending] = key
    return layers


def _pair(
    report: ClientReport, outline: Outline, prefix: str, parts: dict[str, str], target: Target
) -> bool:
    """Judge the factors of a layer; returns whether it has a whole pair."""
    report.matched.update(parts[ending] for ending in SCALARS if ending in parts)
    for up, down, mid in PAIRS:
        if up not in parts or (report.client == "forge" and up in NOT_IN_FORGE):
            continue
        if down not in parts:
            report.fatal.append(f"{prefix}{up} without {down}: KeyError, nothing is loaded")
            return False
        report.matched |= {parts[up], parts[down]}
        mid_shape = None
        if mid and mid in parts:
            report.matched.add(parts[mid])
            mid_shape = outline.shapes[parts[mid]]
        if target.shape is None:
            for ending in (up, down, ".alpha"):
                if ending in parts:
                    report.matched.discard(parts[ending])
                    report.ignored[parts[ending]] = f"the model has no {target.weight}"
        elif not target.weight.endswith(".weight"):
            report.shape_errors.append(f"{prefix}: patches {target.weight}")
        else:
            up_shape, down_shape = outline.shapes[parts[up]], outline.shapes[parts[down]]
            dora = parts.get(".dora_scale")
            if dora and is_by_output(outline.shapes[dora], up_shape):
                report.warnings.append(
                    f"{prefix}: DoRA's norms of each output are divided by the base's norms, not "
                    f"by the adapted weight's"
                )
            error = product_error(up_shape, down_shape, target.shape, mid_shape)
            if error:
                pads = (
                    report.client == "forge"
                    and len(target.shape) == 2
                    and flattened(up_shape)[1] == flattened(down_shape)[0]
                    and up_shape[0] == target.shape[0]
                )
                if pads:
                    error += (
                        " (Forge pads the weight or the delta instead of refusing: broken layer)"
                    )
                report.shape_errors.append(f"{prefix}: {error}")
        return True
    return False


def _replacement(
    report: ClientReport, outline: Outline, prefix: str, parts: dict[str, str], target: Target
) -> bool:
    """Judge whole weights and biases (`diff` and the like); returns whether a weight is there."""
    present = [ending for ending in REPLACEMENTS if ending in parts]
    for ending in present:
        report.matched.add(parts[ending])
        shape = outline.shapes[parts[ending]]
        if target.shape is not None and shape != target.shape:
            report.shape_errors.append(f"{prefix}{ending}: {shape} against {target.shape}")
    if ".w_norm" in parts and ".b_norm" in parts:
        report.matched.add(parts[".b_norm"])
    if ".diff_b" in parts:
        if target.weight.endswith(WITHOUT_BIAS) or "embedding.weight" in target.weight:
            module = target.weight.removesuffix(".weight")
            report.ignored[parts[".diff_b"]] = f"{module} has no bias"
        else:
            report.matched.add(parts[".diff_b"])
    return bool(present)


def _lose_patience(report: ClientReport, touched: list[Target]) -> None:
    unmatched = len(report.unrecognised)
    if unmatched > FORGE_PATIENCE:
        report.fatal.append(
            f"{unmatched} unmatched keys, more than {FORGE_PATIENCE}: Forge prints 'LoRA version "
            f"mismatch' and applies nothing"
        )
    if len({target.weight for target in touched if target.shape is None}) > FORGE_PATIENCE:
        report.fatal.append(
            f"more than {FORGE_PATIENCE} keys without a weight: Forge applies nothing"
        )
