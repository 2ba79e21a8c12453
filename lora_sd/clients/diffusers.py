"""diffusers: takes files in kohya's format after translating them, and files in its own format.

Its own format is PEFT's: 'unet.<path>.lora_A.weight', with one JSON object in the metadata
('lora_adapter_metadata') that says the alphas.
"""

from lora_sd.clients import diffusers_kohya
from lora_sd.clients.fits import exact_error
from lora_sd.clients.outline import Outline
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import Module, Tables

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
PAIR, EMBEDDING_PAIR = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
MAGNITUDE = ("lora_magnitude_vector", "lora_magnitude_vector.weight")


def check(outline: Outline, tables: Tables) -> ClientReport:
    """What diffusers would do with a file."""
    report = ClientReport.of("diffusers", outline)
    for key in outline.shapes:
        if "dora_scale" in key:
            report.ignored[key] = (
                "dora_scale is left out with a warning: DoRA is applied as plain LoRA"
            )
    keys = [key for key in outline.shapes if key not in report.ignored]
    if keys and all(key.startswith(diffusers_kohya.PREFIXES) for key in keys):
        diffusers_kohya.check(report, outline, tables, keys)
    elif not all("lora" in key for key in keys):
        report.fatal.append(
            "a key without 'lora' in its name: ValueError 'Invalid LoRA checkpoint'"
        )
    else:
        _check_own_format(report, outline, tables, keys)
    return report


def _check_own_format(
    report: ClientReport, outline: Outline, tables: Tables, keys: list[str]
) -> None:
    layers: dict[tuple[str, str], dict[str, str]] = {}
    for key in keys:
        component, _, rest = key.partition(".")
        if component in COMPONENTS:
            path, _, part = rest.partition(".lora")
            layers.setdefault((component, path), {})["lora" + part] = key
    _check_text_encoders(report, layers)
    modules = _modules(tables)
    for layer, parts in layers.items():
        if layer in modules:
            _layer(report, outline, ".".join(layer), parts, modules[layer])
    if report.shape_errors:
        report.fatal.append("size mismatch: load raises RuntimeError")
    unet = [layer for layer in layers if layer[0] == "unet"]
    if unet and not any(layer in modules for layer in unet):
        report.fatal.append(diffusers_kohya.NO_UNET_LAYER)
    if not outline.metadata.get("lora_adapter_metadata"):
        report.warnings.append(
            "PEFT format without lora_adapter_metadata: every module gets alpha = its rank (right "
            "only if it was trained so)"
        )


def _check_text_encoders(
    report: ClientReport, layers: dict[tuple[str, str], dict[str, str]]
) -> None:
    for component in dict.fromkeys(c for c, _ in layers if c != "unet"):
        if not any(
            c == component and path.rpartition(".")[2] in ATTENTION and PAIR[0] in parts
            for (c, path), parts in layers.items()
        ):
            report.fatal.append(
                f"{component}: no q/k/v/out_proj LoRA among its keys (mlp or embedding only): "
                f"ValueError 'Could not automatically infer state dict type'"
            )


def _modules(tables: Tables) -> dict[tuple[str, str], Module]:
    """By component and path; the first text encoder's also without 'text_model.'."""
    modules = {}
    for component, paths in tables.modules.items():
        for path, module in paths.items():
            modules[component, path] = module
            if component == "text_encoder":
                modules[component, path.removeprefix("text_model.")] = module
    return modules


def _layer(
    report: ClientReport, outline: Outline, name: str, parts: dict[str, str], module: Module
) -> None:
    if module.kind in ("GroupNorm", "LayerNorm"):
        report.fatal.append(f"{name}: LoRA on a {module.kind}: PEFT raises")
        return
    is_embedding = module.kind == "Embedding"
    read = EMBEDDING_PAIR if is_embedding else (*PAIR, "lora_B.bias", *MAGNITUDE)
    report.matched.update(key for part, key in parts.items() if part in read)
    shapes = {part: outline.shapes[key] for part, key in parts.items()}
    weight = module.shape
    if set(PAIR) <= set(parts):
        error = exact_error(shapes["lora_B.weight"], shapes["lora_A.weight"], weight)
        if error:
            report.shape_errors.append(f"{name}: {error}")
        bias = shapes.get("lora_B.bias")
        if bias is not None and bias != weight[:1]:
            report.shape_errors.append(f"{name}: lora_B.bias {bias} against {weight[:1]}")
    elif is_embedding and len(parts) == 2:
        down, up = (shapes[part] for part in EMBEDDING_PAIR)
        if down[1:] != weight[:1] or up[:1] != weight[1:] or down[0] != up[1]:
            report.shape_errors.append(
                f"{name}: embedding A{down} B{up}, need A[r,{weight[0]}] B[{weight[1]},r]"
            )
    else:
        report.warnings.append(f"{name}: only {sorted(parts)}")
