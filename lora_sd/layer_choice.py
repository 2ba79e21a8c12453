"""Which layers of a model are adapted, and with what rank: presets, patterns, rules.

Only names and shapes are looked at, so that a choice can be shown before anything is loaded.
Patterns are explained in `patterns`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.errors import ConfigError, shown_list
from lora_sd.layers import LayerOptions, magnitude_shape, rank_limit
from lora_sd.parts import ATTENTION, TEXT_ATTENTION, TEXT_ENCODERS, TOKENS, component_of, is_conv
from lora_sd.patterns import invalid_pattern, is_meant, nearest_layers

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
TEXT_FEED_FORWARD = ("mlp.fc1", "mlp.fc2")
TEXT_PRESETS: dict[str, tuple[str, ...]] = {
    preset: TEXT_ATTENTION + (() if preset == "attention" else TEXT_FEED_FORWARD)
    for preset in PRESETS
}


@dataclass(frozen=True)
class LayerPlan:
    """One layer to adapt, by its full name, with the rank and alpha it gets.

    `clamped_from` is the rank it was meant to have, where the layer is too small for that.
    """

    name: str
    rank: int
    alpha: float
    weight_shape: Size
    clamped_from: int = 0

    def planned(self, options: LayerOptions) -> LoRAWeights:
        """What its part of a file will be, on the meta device: shapes without numbers."""
        is_tokens = self.name.endswith(TOKENS)
        outputs, inputs = self.weight_shape[0], self.weight_shape[1:]
        if is_tokens:
            outputs, inputs = self.weight_shape[1], self.weight_shape[:1]
        rank = 2 * self.rank if options.init == "pissa" else self.rank
        ones = [1] * (len(self.weight_shape) - 2)
        norms = None
        with torch.device("meta"):
            if options.dora != "off" and not is_tokens:
                norms = torch.empty(magnitude_shape(self.weight_shape, options.dora))
            bias = torch.empty(outputs) if options.up_bias and not is_tokens else None
            down, up = torch.empty(rank, *inputs), torch.empty(outputs, rank, *ones)
        return LoRAWeights(down, up, self.alpha, bias, norms, is_tokens)


def planned_adapter(plans: Sequence[LayerPlan], options: LayerOptions) -> Adapter:
    """The adapter that training will make, on the meta device: shapes without numbers."""
    return Adapter({plan.name: plan.planned(options) for plan in plans})


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
    rs: bool = False,
) -> list[LayerPlan]:
    """The layers that a preset and patterns name, in the model's order.

    A convolution with a kernel above 1 x 1 gets `conv_rank` and `conv_alpha`; an alpha of None
    means alpha = rank. A rank of 0 leaves the layer alone. A token table is chosen only by a
    pattern of `include` that ends in its name.

    Args:
        shapes: weight shape of every layer of the model (`layer_names`); no weights are needed.
        ranks: ranks of their own for some of the chosen layers, 'PATTERN=RANK' or
            'PATTERN=RANK:ALPHA'; without alpha the scaling stays. The last that fits counts.
        clamp_ranks: give a layer too small for its rank its limit, at the same scaling, instead of
            an error.
        rs: whether the scaling is alpha / sqrt(rank).

    Raises:
        ConfigError: a pattern that matches nothing, nothing chosen at all, or ranks above a
            layer's limit; all problems at once.
    """
    problems: list[str] = []
    rules = [rule for text in ranks if (rule := _rank_rule(text, problems))]

    def usable(setting: str, pattern: str, names: Iterable[str]) -> bool:
        wrong = invalid_pattern(pattern)
        if not wrong and not any(is_meant(pattern, name, shapes[name]) for name in names):
            wrong = f"no layer matches '{pattern}'.{nearest_layers(pattern, shapes)}"
        if wrong:
            problems.append(f"'adapter.{setting}': {wrong}")
        return not wrong

    include = [p for p in include if usable("include", p, shapes)]
    exclude = [p for p in exclude if usable("exclude", p, shapes)]
    chosen = []
    for name, shape in shapes.items():
        presets = TEXT_PRESETS if component_of(name) in TEXT_ENCODERS else PRESETS
        wanted = [*(() if name.endswith(TOKENS) else presets[preset]), *include]
        if any(is_meant(pattern, name, shape) for pattern in wanted) and not any(
            is_meant(pattern, name, shape) for pattern in exclude
        ):
            chosen.append(name)
    rules = [rule for rule in rules if usable("ranks", rule.pattern, chosen)]
    plans, too_large = [], []
    for name in chosen:
        shape = shapes[name]
        first = (
            _RankRule("adapter.conv_rank", conv_rank, conv_alpha)
            if is_conv(shape)
            else _RankRule("adapter.rank", rank, alpha)
        )
        own = [rule for rule in rules if is_meant(rule.pattern, name, shape)]
        wanted_rank, wanted_alpha = _ruled(first, own, rs)
        limit = rank_limit(shape)
        if wanted_rank > limit and not clamp_ranks:
            too_large.append(((own or [first])[-1], limit, name))
        elif wanted_rank > limit:
            clamped = wanted_alpha * _divisor(limit, rs) / _divisor(wanted_rank, rs)
            plans.append(LayerPlan(name, limit, clamped, shape, wanted_rank))
        elif wanted_rank:
            plans.append(LayerPlan(name, wanted_rank, wanted_alpha, shape))
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
    weights = sum(layer.size for layer in planned_adapter(plans, options).layers.values())
    lines.append(
        f"  {len(plans):4d} layers, {weights:,} parameters, "
        f"{weights * bytes_per_weight / 1e6:.1f} MB file"
    )
    if clamped := [plan for plan in plans if plan.clamped_from]:
        names = shown_list([plan.name.removeprefix("unet.") for plan in clamped], 3)
        lines.append(f"  Too small for the rank, and given the largest they allow: {names}.")
    return "\n".join(lines)


@dataclass(frozen=True)
class _RankRule:
    """A rank and alpha for the layers of a pattern, or by a setting of that name."""

    pattern: str
    rank: int
    alpha: float | None


def _divisor(rank: int, rs: bool) -> float:
    """What alpha is divided by."""
    return math.sqrt(rank) if rs else rank


def _ruled(first: _RankRule, rules: Sequence[_RankRule], rs: bool) -> tuple[int, float]:
    """(rank, alpha) of a layer after the rules that fit it; without an alpha the scaling stays."""
    rank, alpha = first.rank, float(first.rank if first.alpha is None else first.alpha)
    scaling = alpha / _divisor(rank, rs) if rank else 1.0
    for rule in rules:
        rank = rule.rank
        alpha = scaling * _divisor(rank, rs) if rule.alpha is None else rule.alpha
        scaling = alpha / _divisor(rank, rs) if rank else scaling
    return rank, alpha


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


def _too_large(entries: Sequence[tuple[_RankRule, int, str]]) -> list[str]:
    """A sentence for each rule that asks more of layers than they allow: (rule, limit, layer)."""
    sentences = []
    for rule in dict.fromkeys(entry[0] for entry in entries):
        mine = [entry for entry in entries if entry[0] == rule]
        limit = min(entry[1] for entry in mine)
        names = [entry[2].removeprefix("unet.") for entry in mine if entry[1] == limit]
        is_setting = rule.pattern.startswith("adapter.")
        what = (
            f"'{rule.pattern}' is {rule.rank}"
            if is_setting
            else (f"'adapter.ranks' gives '{rule.pattern}' {rule.rank}")
        )
        sentences.append(
            f"{what}, but {shown_list(names, 2)} "
            f"{'allow' if len(names) > 1 else 'allows'} at most {limit}. Set it to {limit} or "
            f"less, exclude the layer, or set adapter.clamp_ranks."
        )
    return sentences


def _kind(name: str) -> str:
    """A path without the blocks it lies in: 'attn1.to_q', 'ff.net.2', 'resnets.conv1'."""
    component, _, path = name.partition(".")
    if component in TEXT_ENCODERS:
        return f"{component} {'.'.join(path.split('.')[-2:])}"
    blocks = r"(down_blocks|up_blocks|attentions|transformer_blocks)\.\d+\.|mid_block\."
    return re.sub(r"s\.\d+\.(?=conv|time|\d)", "s.", re.sub(blocks, "", path))
