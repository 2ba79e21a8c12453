"""How diffusers reads a file in kohya's format: translate the names, then load it through PEFT.

Three traps: a key it cannot translate refuses the file; text-encoder attention without any out_proj
is dropped or refused; and alphas other than a component's most common one are lost in attention
layers, because the pattern that should carry them does not match.
"""

from collections import Counter
from typing import NamedTuple

from lora_sd.clients.fits import exact_error
from lora_sd.clients.outline import Outline
from lora_sd.clients.report import ClientReport
from lora_sd.clients.tables import Module, Tables

PREFIXES = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
LDM = ("input_blocks", "middle_block", "output_blocks")
DIFFUSERS = ("down_blocks", "mid_block", "up_blocks")
OUTER = {
    "lora_unet_input_blocks_0_0": "lora_unet_conv_in",
    "lora_unet_out_2": "lora_unet_conv_out",
    "lora_unet_time_embed_0": "lora_unet_time_embedding_linear_1",
    "lora_unet_time_embed_2": "lora_unet_time_embedding_linear_2",
}
"""LDM names that are translated for every base model."""
NO_UNET_LAYER = (
    "no UNet key names a module of this UNet: PEFT raises 'Target modules ... not found in the "
    "base model'"
)


class Layer(NamedTuple):
    """A layer of the file: its prefix, {part: key} and rank."""

    prefix: str
    parts: dict[str, str]
    rank: int


Component = dict[str, Layer]
"""Translated name -> layer."""


def check(report: ClientReport, outline: Outline, tables: Tables, keys: list[str]) -> None:
    """Judge the keys of a file, all of which have kohya's prefixes."""
    layers = _whole_layers(report, outline, _without_mixed_names(report, tables, keys))
    has_alpha = any(ALPHA in parts for parts in layers.values())
    if not report.fatal and has_alpha and outline.metadata.get("lora_adapter_metadata"):
        report.fatal.append(
            "kohya alphas and lora_adapter_metadata in one file: ValueError 'network_alphas and "
            "metadata cannot be specified both'"
        )
    if report.fatal:
        return
    components: dict[str, Component] = {"unet": {}, "text_encoder": {}, "text_encoder_2": {}}
    for prefix, parts in layers.items():
        layer = Layer(prefix, parts, outline.shapes[parts[DOWN]][0])
        if prefix.startswith("lora_unet_"):
            _place_in_unet(report, outline, tables, layer, components["unet"])
        else:
            name = "text_encoder_2" if prefix.startswith("lora_te2_") else "text_encoder"
            _place_in_text_encoder(report, outline, tables, layer, name, components[name])
    in_unet = any(prefix.startswith("lora_unet_") for prefix in layers)
    if in_unet and not components["unet"] and not report.fatal:
        report.fatal.append(NO_UNET_LAYER)
    if report.shape_errors:
        report.fatal.append("size mismatch: load raises RuntimeError")
    for layer in components["unet"].values():
        report.matched.update(layer.parts.values())
    for name in ("text_encoder", "text_encoder_2"):
        _use_text_encoder(report, tables, name, components[name])
    for name, component in components.items():
        _check_alphas(report, outline, name, component)


def _without_mixed_names(report: ClientReport, tables: Tables, keys: list[str]) -> list[str]:
    """SDXL: beside a diffusers name, every LDM name is dropped."""
    ldm = {key for key in keys if any(part in key for part in LDM)}
    mixed = tables.is_sdxl and ldm and any(part in key for key in keys for part in DIFFUSERS)
    if not mixed:
        return keys
    for key in keys:
        if key in ldm:
            report.ignored[key] = (
                "LDM and diffusers names mixed: the LDM ones are dropped, no message"
            )
    return [key for key in keys if key not in ldm]


def _whole_layers(
    report: ClientReport, outline: Outline, keys: list[str]
) -> dict[str, dict[str, str]]:
    layers = Outline({key: outline.shapes[key] for key in keys}).layers()
    for prefix, parts in layers.items():
        extra = [part for part in parts if part not in (DOWN, UP, ALPHA)]
        if extra or DOWN not in parts:
            report.fatal.append(
                f"{prefix}: keys {extra or sorted(parts)} are not converted: ValueError 'have not "
                f"been correctly renamed', nothing is loaded"
            )
        elif UP not in parts:
            report.fatal.append(f"{prefix}: lora_up.weight missing: KeyError, nothing is loaded")
    return layers


def _check_shape(
    report: ClientReport, outline: Outline, layer: Layer, weight: tuple[int, ...]
) -> None:
    up, down = outline.shapes[layer.parts[UP]], outline.shapes[layer.parts[DOWN]]
    error = exact_error(up, down, weight)
    if error:
        report.shape_errors.append(f"{layer.prefix}: {error}")


def _place_in_unet(
    report: ClientReport, outline: Outline, tables: Tables, layer: Layer, unet: Component
) -> None:
    prefix, name = layer.prefix, OUTER.get(layer.prefix, layer.prefix)
    added = tables.is_sdxl and "add_embedding" in prefix
    if name == prefix and (name not in tables.unet_layers or added):
        name = tables.ldm_names.get(prefix, "") if tables.is_sdxl else ""
    if name in tables.unet_layers:
        _check_shape(report, outline, layer, tables.unet_layers[name])
        unet[name] = layer
        return
    for path, module in tables.modules.get("unet", {}).items():
        is_norm = module.kind in ("GroupNorm", "LayerNorm")
        if is_norm and prefix == "lora_unet_" + path.replace(".", "_"):
            report.fatal.append(f"{prefix}: LoRA on a {module.kind}: PEFT raises ValueError")


def _text_module(tables: Tables, component: str, path: str) -> Module | None:
    module = tables.text_paths.get((component, path))
    return module if module and module.kind in ("Linear", "Embedding") else None


def _place_in_text_encoder(
    report: ClientReport,
    outline: Outline,
    tables: Tables,
    layer: Layer,
    name: str,
    component: Component,
) -> None:
    path = layer.prefix.split("_", 2)[2]
    module = _text_module(tables, name, path)
    if module is None and name == "text_encoder":
        module = _text_module(tables, name, "text_model_" + path)
        if module:
            report.warnings.append(
                f"{layer.prefix}: name lacks text_model_; loads only where transformers >= 5.6 "
                f"flattened CLIPTextModel"
            )
    component[path] = layer
    if module and module.kind == "Linear":
        _check_shape(report, outline, layer, module.shape)


def _use_text_encoder(
    report: ClientReport, tables: Tables, name: str, component: Component
) -> None:
    if not component:
        return
    has_out = any("out_proj" in path for path in component)
    if not has_out and not any("mlp_" in path for path in component):
        report.fatal.append(
            f"{name}: attention keys without any out_proj: ValueError 'Could not automatically "
            f"infer state dict type' (after the UNet part was loaded)"
        )
        return
    for path, layer in component.items():
        module = _text_module(tables, name, path) or _text_module(
            tables, name, "text_model_" + path
        )
        if module is None or module.kind != "Linear":
            continue
        if has_out or not any(part in path for part in ("_q_proj", "_k_proj", "_v_proj")):
            report.matched.update(layer.parts.values())
            continue
        for key in layer.parts.values():
            report.ignored[key] = f"{name}: q/k/v without any out_proj is dropped, no message"


def _check_alphas(
    report: ClientReport, outline: Outline, component_name: str, component: Component
) -> None:
    alphas = {
        name: outline.alphas[layer.parts[ALPHA]]
        for name, layer in component.items()
        if layer.parts.get(ALPHA) in outline.alphas
    }
    if not alphas:
        return
    common = Counter(alphas.values()).most_common(1)[0][0]
    for name, (prefix, parts, rank) in component.items():
        if any(key in report.ignored for key in parts.values()):
            continue
        alpha = alphas.get(name)
        if alpha is None and common != rank:
            report.warnings.append(
                f"{prefix}: no alpha while others have one: scale {common}/{rank} instead of 1"
            )
        elif alpha is not None and alpha != common and _loses_alpha(component_name, name):
            report.warnings.append(
                f"{prefix}: alpha {alpha:g} is not the {component_name}'s most common {common:g}: "
                f"diffusers scales it {common:g}/{rank} instead of {alpha:g}/{rank}, no message"
            )


def _loses_alpha(component: str, name: str) -> bool:
    """Whether a layer's own alpha is lost where it is not its component's most common one."""
    if component == "unet":
        projections = ("_to_q", "_to_k", "_to_v", "_to_out_0")
        return ("attn1" in name or "attn2" in name) and any(p in name for p in projections)
    return component == "text_encoder" or "self_attn" in name
