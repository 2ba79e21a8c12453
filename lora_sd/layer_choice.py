"""Which layers of a model are adapted, and with what rank: presets, patterns, rules.

Only names and shapes are looked at, so that a choice can be shown before anything is loaded. A
pattern names layers by their full name (as in `adapter`), or by the path behind the component:

    'attn2.to_k'        every layer whose path ends in it, at a dot
    'up_blocks.1.*'     a glob over the whole path
    're:.*attn1.*to_v'  a regular expression over the whole path
    'block:up.1'        a block: down.0 to down.3, mid, up.0 to up.3, rest, text_encoder;
                        'block:mid/conv' and 'block:mid/linear' only its convolutions or the others
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from torch import Size

from lora_sd.errors import ConfigError, shown_list
from lora_sd.layers import LayerOptions, rank_limit
from lora_sd.parts import TEXT_ENCODERS, TOKENS, block_of, component_of, is_conv

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
        extra = 0 if self.name.endswith(TOKENS) else (options.dora != "off") + options.up_bias
        return ranks * (inputs + outputs) + outputs * extra


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
