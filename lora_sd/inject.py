"""Choose layers of a UNet, put adapters into them, take them out, and collect what was trained.

A pattern names layers by their dotted path in the model:
    'attn2.to_k'        every layer whose path ends in it, at a dot
    'up_blocks.1.*'     a glob over the whole path
    're:.*attn1.*to_v'  a regular expression over the whole path
"""

import fnmatch
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Size, nn

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.errors import AdapterError, ConfigError, shown_list
from lora_sd.layers import ConvLoRA, LinearLoRA, LoRALayer, rank_limit

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
CONVOLUTION = (
    "re:.*resnets\\.\\d+\\.conv[12]",
    "re:.*downsamplers\\.\\d+\\.conv",
    "re:.*upsamplers\\.\\d+\\.conv",
)
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION,
    "attention-ff": ATTENTION + FEED_FORWARD,
    "attention-conv": ATTENTION + FEED_FORWARD + CONVOLUTION,
    "full": ("*",),
}


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt, with the rank and alpha it gets."""

    name: str
    rank: int
    alpha: float
    is_conv: bool
    parameters: int


def adaptable_layers(model: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Every linear and convolution layer by its path; where one is adapted already, its base."""
    found: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, module in _walk(model):
        layer = module.base if isinstance(module, LoRALayer) else module
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = layer
    return found


def layer_shapes(model: nn.Module, component: str = "unet") -> dict[str, Size]:
    """Weight shape of every adaptable layer, by full name ('unet.' and the path)."""
    return {f"{component}.{n}": layer.weight.shape for n, layer in adaptable_layers(model).items()}


def choose_layers(
    model: nn.Module,
    preset: str,
    rank: int,
    alpha: float | None,
    conv_rank: int,
    conv_alpha: float | None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    clamp_ranks: bool = False,
) -> list[LayerPlan]:
    """The layers that a preset and patterns name, in the model's order.

    A convolution with a kernel above 1 x 1 gets `conv_rank` and `conv_alpha`; an alpha of None
    means alpha = rank. A rank above a
    layer's limit is an error, or with `clamp_ranks` becomes the limit; the scaling stays.

    Raises:
        ConfigError: a pattern that matches nothing, nothing chosen at all, or ranks above a
            layer's limit; all problems at once.
    """
    layers = adaptable_layers(model)
    invalid = {pattern: why for pattern in (*include, *exclude) if (why := _invalid(pattern))}
    include = [pattern for pattern in include if pattern not in invalid]
    exclude = [pattern for pattern in exclude if pattern not in invalid]
    problems = list(invalid.values()) + [
        f"'adapter.{option}': no layer matches '{pattern}'.{_nearest_layer(pattern, layers)}"
        for option, patterns in (("include", include), ("exclude", exclude))
        for pattern in patterns
        if not any(matches(pattern, name) for name in layers)
    ]
    wanted = [*PRESETS[preset], *include]
    plans, too_large = [], []
    for name, layer in layers.items():
        if not any(matches(p, name) for p in wanted) or any(matches(p, name) for p in exclude):
            continue
        is_conv = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        layer_rank, given = (conv_rank, conv_alpha) if is_conv else (rank, alpha)
        layer_alpha = float(layer_rank if given is None else given)
        limit = rank_limit(layer)
        if layer_rank > limit and clamp_ranks:
            layer_rank, layer_alpha = limit, layer_alpha * limit / layer_rank
        if layer_rank > limit:
            setting = "adapter.conv_rank" if is_conv else "adapter.rank"
            too_large.append((setting, layer_rank, limit, name))
        out_size, in_size = layer.weight.flatten(1).shape
        plans.append(
            LayerPlan(name, layer_rank, layer_alpha, is_conv, layer_rank * (in_size + out_size))
        )
    for setting in sorted({entry[0] for entry in too_large}):
        entries = [entry for entry in too_large if entry[0] == setting]
        limit = min(entry[2] for entry in entries)
        names = [entry[3] for entry in entries if entry[2] == limit]
        problems.append(
            f"'{setting}' is {entries[0][1]}, but {shown_list(names, 2)} "
            f"{'allow' if len(names) > 1 else 'allows'} at most {limit}. Set it to {limit} or "
            f"less, exclude the layer, or set adapter.clamp_ranks."
        )
    if not plans and not problems:
        problems.append("'adapter.exclude' leaves no layer to train.")
    if problems:
        raise ConfigError(problems)
    return plans


def attach(
    model: nn.Module, plans: Sequence[LayerPlan], init: str = "kaiming", seed: int = 0
) -> dict[str, LoRALayer]:
    """Wrap the planned layers, freeze everything else; the new layers by path.

    Each layer's start depends on the seed and its own name alone, so that choosing other layers
    beside it changes nothing.
    """
    model.requires_grad_(False)
    attached: dict[str, LoRALayer] = {}
    for plan in plans:
        base = model.get_submodule(plan.name)
        if isinstance(base, LoRALayer):
            raise ValueError(f"layer '{plan.name}' is adapted already")
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(plan.name.encode()))
        kind = ConvLoRA if isinstance(base, nn.Conv2d) else LinearLoRA
        attached[plan.name] = kind(base, plan.rank, plan.alpha, init, generator)  # type: ignore[arg-type]
        model.set_submodule(plan.name, attached[plan.name])
    return attached


def attach_adapter(
    model: nn.Module, adapter: Adapter, scale: float = 1.0, component: str = "unet"
) -> dict[str, LoRALayer]:
    """Attach layers that hold an adapter's weights, live: a scale can be changed at any time.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    adapter.check_fits(layer_shapes(model, component), "the adapter")
    names = {
        full.removeprefix(f"{component}."): weights for full, weights in adapter.layers.items()
    }
    plans = [LayerPlan(name, w.rank, w.alpha, w.down.dim() == 4, 0) for name, w in names.items()]
    attached = attach(model, plans)
    load(attached, adapter, component)
    set_scale(model, scale)
    return attached


def detach(model: nn.Module) -> None:
    """Put the base layers back; the model is then as it was before `attach`."""
    for name, layer in list(lora_layers(model).items()):
        model.set_submodule(name, layer.base)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The adapted layers by path."""
    return {name: module for name, module in _walk(model) if isinstance(module, LoRALayer)}


def set_scale(model: nn.Module, scale: float) -> None:
    """Set the scale of every adapted layer: 1 as trained, 0 gives the base bit for bit."""
    for layer in lora_layers(model).values():
        layer.scale = float(scale)


def collect(model: nn.Module, component: str = "unet") -> Adapter:
    """A copy of what the adapted layers hold, on the CPU."""
    return Adapter(
        {
            f"{component}.{name}": LoRAWeights(
                layer.lora_down.weight.detach().cpu().clone(),
                layer.lora_up.weight.detach().cpu().clone(),
                layer.alpha,
            )
            for name, layer in lora_layers(model).items()
        }
    )


@torch.no_grad()
def load(layers: dict[str, LoRALayer], adapter: Adapter, component: str = "unet") -> None:
    """Copy an adapter's weights into attached layers of the same names, ranks and alphas.

    Raises:
        AdapterError: naming every layer that is missing, unexpected or different, at once.
    """
    have = {f"{component}.{name}": layer for name, layer in layers.items()}
    problems = [f"layer '{name}' is missing from it" for name in have if name not in adapter.layers]
    for name, weights in adapter.layers.items():
        if name not in have:
            problems.append(f"layer '{name}' is not adapted here")
        elif weights.down.shape != have[name].lora_down.weight.shape:
            problems.append(f"layer '{name}' has rank {weights.rank}, not {have[name].rank}")
        elif weights.alpha != have[name].alpha:
            problems.append(f"layer '{name}' has alpha {weights.alpha}, not {have[name].alpha}")
    if problems:
        raise AdapterError([f"The adapter does not fit: {problem}." for problem in problems])
    for name, weights in adapter.layers.items():
        have[name].lora_down.weight.copy_(weights.down)
        have[name].lora_up.weight.copy_(weights.up)


def describe(plans: Sequence[LayerPlan], bytes_per_weight: int = 2) -> str:
    """One line for each kind of layer that was chosen, and the total with the file's size."""
    kinds: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        kinds.setdefault(_kind(plan.name), []).append(plan)
    lines = []
    for kind, members in kinds.items():
        ranks = sorted({plan.rank for plan in members})
        alphas = sorted({plan.alpha for plan in members})
        lines.append(
            f"  {len(members):4d} x {kind:<24} rank {'/'.join(map(str, ranks)):<4} "
            f"alpha {'/'.join(f'{alpha:g}' for alpha in alphas)}"
        )
    parameters = sum(plan.parameters for plan in plans)
    lines.append(
        f"  {len(plans):4d} layers, {parameters:,} parameters, "
        f"{parameters * bytes_per_weight / 1e6:.1f} MB file"
    )
    return "\n".join(lines)


def matches(pattern: str, name: str) -> bool:
    """Whether a layer's path fits a pattern (module docstring)."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")


def _walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` in order, not looking into adapted layers."""
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        yield path, child
        if not isinstance(child, LoRALayer):
            yield from _walk(child, f"{path}.")


def _kind(name: str) -> str:
    """A path without the blocks it lies in: 'attn1.to_q', 'ff.net.2', 'resnets.conv1'."""
    blocks = r"(down_blocks|up_blocks|attentions|transformer_blocks)\.\d+\.|mid_block\."
    return re.sub(r"s\.\d+\.(?=conv|time|\d)", "s.", re.sub(blocks, "", name))


def _invalid(pattern: str) -> str:
    """The sentence about a pattern that is no valid regular expression; '' when it is fine."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return f"'{pattern}' is not a valid regular expression: {error}."
    return ""


def _nearest_layer(pattern: str, layers: dict[str, nn.Linear | nn.Conv2d]) -> str:
    """' Did you mean ...?' with the nearest path ending of as many parts as the pattern has."""
    depth = pattern.count(".") + 1
    endings = sorted({".".join(name.split(".")[-depth:]) for name in layers})
    near = get_close_matches(pattern.removeprefix("re:"), endings, n=1, cutoff=0.0)
    return f" Did you mean '{near[0]}'?" if near else ""
