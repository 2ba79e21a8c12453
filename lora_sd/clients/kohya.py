"""kohya's tools (sd-scripts) and LyCORIS: layers are built from the file, factors copied in.

Both need factors of the exact shape. kohya's tools know the layers that they train and translate
diffusers' UNet names of SDXL; LyCORIS looks for any module of that name, and wants alpha.
"""

from lora_sd.clients.fits import exact_error, product_error
from lora_sd.clients.outline import Outline, Shape, is_other_kind
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import Module, Tables

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"


def check_kohya(outline: Outline, tables: Tables) -> ClientReport:
    """What kohya's tools would do with a file."""
    report = ClientReport.of("kohya", outline)
    ldm_of = {name: ldm for ldm, name in tables.ldm_names.items()}
    for prefix, parts in outline.layers().items():
        name = ldm_of.get(prefix, prefix) if tables.is_sdxl else prefix
        weight = tables.kohya.get(name)
        if weight is None:
            continue
        if DOWN in parts and UP in parts:
            shapes = {part: outline.shapes[key] for part, key in parts.items()}
            _judge(report, prefix, exact_error(shapes[UP], shapes[DOWN], weight))
            _use(report, parts, {DOWN, UP, "alpha"})
            if "alpha" not in parts:
                report.warnings.append(f"{prefix}: no alpha, taken as rank")
        elif DOWN in parts:
            report.warnings.append(f"{prefix}: lora_up.weight missing, stays zero")
            _use(report, parts, {DOWN, "alpha"})
    return report


def check_lycoris(outline: Outline, tables: Tables) -> ClientReport:
    """What LyCORIS would do with a file."""
    report = ClientReport.of("lycoris", outline)
    without_lora = _modules_without_lora(tables)
    for prefix, parts in outline.layers().items():
        is_lora = any(part.startswith("lora_") for part in parts)
        if prefix in without_lora:
            if is_lora:
                kind = without_lora[prefix].kind
                report.fatal.append(f"{prefix}: LoRA on a {kind}: LoConModule raises ValueError")
            else:
                _use(report, parts, {"w_norm", "b_norm"})
            continue
        weight = _lycoris_weight(tables, prefix)
        if weight is None:
            continue
        if UP in parts and "alpha" not in parts:
            report.fatal.append(f"{prefix}: no alpha: create_network_from_weights raises TypeError")
        elif DOWN in parts and UP in parts:
            shapes = {part: outline.shapes[key] for part, key in parts.items()}
            if MID in parts:
                error = product_error(shapes[UP], shapes[DOWN], weight, shapes[MID])
            else:
                error = exact_error(shapes[UP], shapes[DOWN], weight)
            _judge(report, prefix, error)
            _use(report, parts, {DOWN, UP, MID, "alpha", "dora_scale"})
        elif is_lora:
            report.fatal.append(f"{prefix}: incomplete layer: create_network_from_weights raises")
        elif "w_norm" in parts or "diff" in parts or any(map(is_other_kind, parts)):
            _use(report, parts, set(parts))
    return report


def _modules_without_lora(tables: Tables) -> dict[str, Module]:
    """Norms and embeddings, which LyCORIS finds by name. SDXL's UNet has LDM names there."""
    modules = dict(tables.text_modules)
    if not tables.is_sdxl:
        unet = tables.modules.get("unet", {}).items()
        modules.update({"lora_unet_" + path.replace(".", "_"): module for path, module in unet})
    return {key: module for key, module in modules.items() if not module.takes_lora}


def _lycoris_weight(tables: Tables, prefix: str) -> Shape | None:
    if prefix in tables.text_layers:
        return tables.text_layers[prefix]
    if tables.is_sdxl:
        prefix = tables.ldm_names.get(prefix, "")
    return tables.unet_layers.get(prefix)


def _judge(report: ClientReport, prefix: str, error: str | None) -> None:
    if error:
        report.shape_errors.append(f"{prefix}: {error}")
        report.fatal.append(f"{prefix}: size mismatch, load_state_dict raises")


def _use(report: ClientReport, parts: dict[str, str], read: set[str]) -> None:
    report.matched.update(key for part, key in parts.items() if part in read)
