"""Choose layers of a model, put adapters into them, take them out, and collect what was trained.

A model is a UNet alone, or its parts by component: {'unet': unet, 'text_encoder': text_encoder}.
Layers have full names, as in `adapter`. A pattern names layers by their full name, or by the path
behind the component:

    'attn2.to_k'        every layer whose path ends in it, at a dot
    'up_blocks.1.*'     a glob over the whole path
    're:.*attn1.*to_v'  a regular expression over the whole path
    'block:up.1'        a block: down.0 to down.3, mid, up.0 to up.3, rest, text_encoder;
                        'block:mid/conv' and 'block:mid/linear' only its convolutions or the others
"""

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Size, nn

from lora_sd.adapter import Adapter
from lora_sd.errors import AdapterError, ConfigError, shown_list
from lora_sd.layers import (
    GIVEN,
    Adaptable,
    LayerOptions,
    LoRALayer,
    innermost,
    rank_limit,
    wrapper_of,
)
from lora_sd.parts import TEXT_ENCODERS, Scales, block_of, component_of, is_conv
from lora_sd.randomness import generator

Model = nn.Module | Mapping[str, nn.Module]

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
# All four of the attention or none: A1111 and diffusers drop or refuse anything less.
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_FEED_FORWARD = ("mlp.fc1", "mlp.fc2")
TEXT_PRESETS: dict[str, tuple[str, ...]] = {
    preset: TEXT_ATTENTION + (() if preset == "attention" else TEXT_FEED_FORWARD)
    for preset in PRESETS
}
TOKENS = "token_embedding"


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt, by its full name, with the rank and alpha it gets."""

    name: str
    rank: int
    alpha: float
    weight_shape: Size

    def weights(self, options: LayerOptions) -> int:
        """How many numbers its part of a file holds, without alpha."""
        outputs, inputs = self.weight_shape[0], self.weight_shape[1:].numel()
        ranks = 2 * self.rank if options.init == "pissa" else self.rank
        extra = 0 if self.name.endswith(TOKENS) else options.dora + options.up_bias
        return ranks * (inputs + outputs) + outputs * extra


def components_of(model: Model) -> dict[str, nn.Module]:
    """The parts of a model by component; a module alone is a UNet."""
    return {"unet": model} if isinstance(model, nn.Module) else dict(model)


def adaptable_layers(model: Model) -> dict[str, Adaptable]:
    """Every linear and convolution layer, and the text encoders' token tables, by full name; where
    one is adapted already, the plain layer under it."""
    found: dict[str, Adaptable] = {}
    for name, (module, _) in _walk(model):
        layer = innermost(module)
        is_tokens = isinstance(layer, nn.Embedding) and name.endswith(TOKENS)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) or is_tokens:
            found[name] = layer
    return found


def layer_shapes(model: Model) -> dict[str, Size]:
    """Weight shape of every adaptable layer, by full name."""
    return {name: layer.weight.shape for name, layer in adaptable_layers(model).items()}


def choose_layers(
    shapes: Mapping[str, Size],
    preset: str,
    rank: int,
    alpha: float | None,
    conv_rank: int,
    conv_alpha: float | None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    ranks: Sequence[str] = (),
    clamp_ranks: bool = False,
) -> list[LayerPlan]:
    """The layers that a preset and patterns name, in the model's order.

    A convolution with a kernel above 1 x 1 gets `conv_rank` and `conv_alpha`; an alpha of None
    means alpha = rank. A rank of 0 leaves the layer alone. A token table is chosen only by a
    pattern of `include` that ends in its name.

    Args:
        shapes: weight shape of every layer of the model (`layer_shapes`); no weights are needed.
        ranks: ranks of their own for some of the chosen layers, 'PATTERN=RANK' or
            'PATTERN=RANK:ALPHA'; without alpha the scaling stays. The last that fits counts.
        clamp_ranks: give a layer too small for its rank its limit, at the same scaling, instead of
            an error.

    Raises:
        ConfigError: a pattern that matches nothing, nothing chosen at all, or ranks above a
            layer's limit; all problems at once.
    """
    problems: list[str] = []
    rules = [rule for text in ranks if (rule := _rank_rule(text, problems))]

    def usable(setting: str, pattern: str, names: Iterable[str]) -> bool:
        wrong = invalid_pattern(pattern)
        if not wrong and not any(_is_meant(pattern, name, shapes[name]) for name in names):
            wrong = f"'adapter.{setting}': no layer matches '{pattern}'."
            wrong += nearest_layers(pattern, shapes)
        if wrong:
            problems.append(wrong)
        return not wrong

    include = [p for p in include if usable("include", p, shapes)]
    exclude = [p for p in exclude if usable("exclude", p, shapes)]
    chosen = []
    for name, shape in shapes.items():
        presets = TEXT_PRESETS if component_of(name) in TEXT_ENCODERS else PRESETS
        wanted = [*(() if name.endswith(TOKENS) else presets[preset]), *include]
        if any(_is_meant(pattern, name, shape) for pattern in wanted) and not any(
            _is_meant(pattern, name, shape) for pattern in exclude
        ):
            chosen.append(name)
    rules = [rule for rule in rules if usable("ranks", rule.pattern, chosen)]
    plans, too_large = [], []
    for name in chosen:
        shape = shapes[name]
        conv = is_conv(shape)
        layer_rank, given = (conv_rank, conv_alpha) if conv else (rank, alpha)
        layer_alpha = float(layer_rank if given is None else given)
        setting = "adapter.conv_rank" if conv else "adapter.rank"
        scaling = 1.0
        for rule in rules:
            if _is_meant(rule.pattern, name, shape):
                scaling = layer_alpha / layer_rank if layer_rank else scaling
                layer_alpha = scaling * rule.rank if rule.alpha is None else rule.alpha
                layer_rank, setting = rule.rank, "adapter.ranks"
        limit = rank_limit(shape)
        if layer_rank > limit and clamp_ranks:
            layer_rank, layer_alpha = limit, layer_alpha * limit / layer_rank
        if layer_rank > limit:
            too_large.append((setting, layer_rank, limit, name))
        if layer_rank:
            plans.append(LayerPlan(name, layer_rank, layer_alpha, shape))
    problems += _too_large(too_large)
    if not plans and not problems:
        problems.append(
            "Every chosen layer has rank 0, which leaves it alone. Give 'adapter.rank' or "
            "'adapter.conv_rank' at least 1."
            if chosen
            else "'adapter.exclude' leaves no layer to train."
            if exclude
            else "The settings choose no layer to train."
        )
    if problems:
        raise ConfigError(problems)
    return plans


def attach(
    model: Model,
    plans: Sequence[LayerPlan],
    options: LayerOptions | None = None,
    seed: int = 0,
    adapter_name: str = "default",
) -> dict[str, LoRALayer]:
    """Wrap the planned layers, freeze everything else; the new layers by full name.

    Each layer's start depends on the seed and its own name alone, so that choosing other layers
    beside it changes nothing. Layers of another adapter's are wrapped once more. A token table has
    neither up-bias nor DoRA.

    Raises:
        ValueError: a layer is adapted already under that adapter's name.
    """
    places = dict(_walk(model))
    options = options or LayerOptions()
    tokens = replace(options, up_bias=False, dora=False)
    for module in components_of(model).values():
        module.requires_grad_(False)
    attached: dict[str, LoRALayer] = {}
    for plan in plans:
        base, (root, path) = places[plan.name]
        if any(layer.adapter_name == adapter_name for layer in _chain(base)):
            raise ValueError(f"layer '{plan.name}' is adapted already")
        layer = wrapper_of(base)(
            base,  # type: ignore[arg-type]
            plan.rank,
            plan.alpha,
            **asdict(tokens if plan.name.endswith(TOKENS) else options),
            generator=generator(seed, "start", plan.name),
        )
        layer.adapter_name = adapter_name
        root.set_submodule(path, layer)
        attached[plan.name] = layer
    return attached


@torch.no_grad()
def attach_adapter(
    model: Model,
    adapter: Adapter,
    scale: float | torch.Tensor | Scales = 1.0,
    adapter_name: str = "default",
) -> dict[str, LoRALayer]:
    """Attach layers that hold an adapter's weights, live: a scale can be changed at any time.

    They do not learn.

    Raises:
        AdapterError: the adapter does not fit the model.
    """
    adapter.check_fits(layer_shapes(model), "the adapter")
    attached: dict[str, LoRALayer] = {}
    for up_bias in (False, True):
        plans = [
            LayerPlan(name, weights.rank, weights.alpha, weights.weight_shape)
            for name, weights in adapter.layers.items()
            if (weights.up_bias is not None) == up_bias
        ]
        if plans:
            options = LayerOptions(init=GIVEN, up_bias=up_bias)
            attached |= attach(model, plans, options, adapter_name=adapter_name)
    for name, layer in attached.items():
        weights = adapter.layers[name]
        if weights.magnitude is not None:
            layer.add_magnitude(weights.magnitude)
        layer.load(weights)
        layer.requires_grad_(False)
    set_scale(model, scale, adapter_name)
    return attached


def detach(model: Model, adapter_name: str | None = None) -> None:
    """Put the plain layers back, or take one adapter's wrappers out; bit for bit."""
    for _, (module, (root, path)) in list(_walk(model)):
        layers = list(_chain(module))
        kept = [layer for layer in layers if adapter_name not in (None, layer.adapter_name)]
        if len(kept) == len(layers):
            continue
        for layer in layers:
            layer.unmerge()
        inner = innermost(module)
        for layer in reversed(kept):
            layer.base = inner
            inner = layer
        root.set_submodule(path, inner)


def lora_layers(model: Model, adapter_name: str = "default") -> dict[str, LoRALayer]:
    """An adapter's layers by full name."""
    return {
        name: layer
        for name, (module, _) in _walk(model)
        for layer in _chain(module)
        if layer.adapter_name == adapter_name
    }


def set_scale(
    model: Model, scale: float | torch.Tensor | Scales, adapter_name: str = "default"
) -> None:
    """Set the scale of an adapter's layers: 1 as trained, 0 gives the base bit for bit.

    Args:
        scale: one for all layers; a tensor (samples,) of one for each sample; or by part.
    """
    for name, layer in lora_layers(model, adapter_name).items():
        if isinstance(scale, Scales):
            layer.set_scale(scale.of(name, layer.weight.shape))
        else:
            layer.set_scale(scale)


def collect(model: Model, adapter_name: str = "default") -> Adapter:
    """A copy of what an adapter's layers hold, on the CPU."""
    return Adapter(
        {
            name: layer.weights().to("cpu", copy=True)
            for name, layer in lora_layers(model, adapter_name).items()
        }
    )


def load(layers: Mapping[str, LoRALayer], adapter: Adapter) -> None:
    """Copy an adapter's weights into attached layers of the same names, ranks and alphas.

    Raises:
        AdapterError: naming every layer that is missing, unexpected or different, at once.
    """
    problems = [f"layer '{name}' is missing from it" for name in layers.keys() - adapter.layers]
    for name, weights in adapter.layers.items():
        if name not in layers:
            problems.append(f"layer '{name}' is not adapted here")
        elif different := layers[name].difference(weights):
            problems.append(f"layer '{name}' {different}")
    if problems:
        raise AdapterError([f"The adapter does not fit: {problem}." for problem in problems])
    for name, weights in adapter.layers.items():
        layers[name].load(weights)


def describe(
    plans: Sequence[LayerPlan], options: LayerOptions | None = None, bytes_per_weight: int = 2
) -> str:
    """One line for each kind of layer that was chosen, and the total with the file's size."""
    options = options or LayerOptions()
    kinds: dict[str, list[LayerPlan]] = {}
    for plan in plans:
        kinds.setdefault(_kind(plan.name), []).append(plan)
    lines, width = [], max([24, *map(len, kinds)])
    for kind, members in kinds.items():
        ranks = sorted({plan.rank for plan in members})
        alphas = sorted({plan.alpha for plan in members})
        lines.append(
            f"  {len(members):4d} x {kind:<{width}} rank {'/'.join(map(str, ranks)):<4} "
            f"alpha {'/'.join(f'{alpha:g}' for alpha in alphas)}"
        )
    weights = sum(plan.weights(options) for plan in plans)
    lines.append(
        f"  {len(plans):4d} layers, {weights:,} parameters, "
        f"{weights * bytes_per_weight / 1e6:.1f} MB file"
    )
    return "\n".join(lines)


def matches(pattern: str, name: str, conv: bool = False) -> bool:
    """Whether a layer's full name fits a pattern (module docstring).

    Args:
        conv: whether the layer is a convolution with a kernel above 1 x 1.
    """
    if pattern.startswith("block:"):
        block, _, kind = pattern[6:].partition("/")
        return block == block_of(name) and kind in ("", "conv" if conv else "linear")
    path = name.partition(".")[2]
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], one) for one in (path, name))
    if any(sign in pattern for sign in "*?["):
        return any(fnmatch.fnmatchcase(one, pattern) for one in (path, name))
    return name == pattern or name.endswith(f".{pattern}")


def _is_meant(pattern: str, name: str, shape: Size) -> bool:
    """Whether a pattern names a layer; a token table only by its own name."""
    if name.endswith(TOKENS) and not pattern.endswith(TOKENS):
        return False
    return matches(pattern, name, is_conv(shape))


@dataclass(frozen=True)
class _RankRule:
    pattern: str
    rank: int
    alpha: float | None


def _rank_rule(text: str, problems: list[str]) -> _RankRule | None:
    """'PATTERN=RANK[:ALPHA]' taken apart; a sentence more in `problems` where it is not one."""
    found = re.fullmatch(r"\s*(\S+?)\s*=\s*(\d{1,4})\s*(?::\s*(\d+(?:\.\d+)?)\s*)?", text)
    if not found or (found[3] and float(found[3]) == 0):
        problems.append(
            f"'adapter.ranks' holds '{text}': write PATTERN=RANK or PATTERN=RANK:ALPHA, such as "
            f"attn2.to_k=32 or block:mid/conv=4:2."
        )
        return None
    return _RankRule(found[1], int(found[2]), float(found[3]) if found[3] else None)


def _too_large(entries: Sequence[tuple[str, int, int, str]]) -> list[str]:
    """A sentence for each setting that asks more of layers than they allow."""
    sentences = []
    for setting in sorted({entry[0] for entry in entries}):
        mine = [entry for entry in entries if entry[0] == setting]
        limit = min(entry[2] for entry in mine)
        names = [entry[3].removeprefix("unet.") for entry in mine if entry[2] == limit]
        sentences.append(
            f"'{setting}' is {mine[0][1]}, but {shown_list(names, 2)} "
            f"{'allow' if len(names) > 1 else 'allows'} at most {limit}. Set it to {limit} or "
            f"less, exclude the layer, or set adapter.clamp_ranks."
        )
    return sentences


Place = tuple[nn.Module, str]  # (a component, the path below it as its own parts are called)


def _walk(model: Model) -> Iterator[tuple[str, tuple[nn.Module, Place]]]:
    """(full name, (module, its place)) of every part of a model, not looking into wrappers."""

    def below(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        for name, child in module.named_children():
            yield f"{prefix}{name}", child
            if not isinstance(child, LoRALayer):
                yield from below(child, f"{prefix}{name}.")

    for component, root in components_of(model).items():
        for path, module in below(root, ""):
            named = path
            if component in TEXT_ENCODERS and not path.startswith(("text_model", "text_proj")):
                named = f"text_model.{path}"  # transformers 5.6 and newer leave it out
            yield f"{component}.{named}", (module, (root, path))


def _chain(module: Any) -> Iterator[LoRALayer]:
    """The wrappers of a layer, outermost first."""
    while isinstance(module, LoRALayer):
        yield module
        module = module.base


def _kind(name: str) -> str:
    """A path without the blocks it lies in: 'attn1.to_q', 'ff.net.2', 'resnets.conv1'."""
    component, _, path = name.partition(".")
    if component in TEXT_ENCODERS:
        return f"{component} {'.'.join(path.split('.')[-2:])}"
    blocks = r"(down_blocks|up_blocks|attentions|transformer_blocks)\.\d+\.|mid_block\."
    return re.sub(r"s\.\d+\.(?=conv|time|\d)", "s.", re.sub(blocks, "", path))


def invalid_pattern(pattern: str) -> str:
    """The sentence about a pattern that is no valid regular expression; '' when it is fine."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return f"'{pattern}' is not a valid regular expression: {error}."
    return ""


def nearest_layers(pattern: str, layers: Iterable[str]) -> str:
    """' Did you mean ...?' with the nearest path endings of as many parts as the pattern has."""
    if pattern.startswith("block:"):
        blocks = dict.fromkeys(block_of(name) for name in layers)
        return f" The blocks are {', '.join(blocks)}."
    depth = pattern.count(".") + 1
    endings = sorted({".".join(name.split(".")[-depth:]) for name in layers})
    near = get_close_matches(pattern.removeprefix("re:"), endings, n=2, cutoff=0.0)
    return f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
