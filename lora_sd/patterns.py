"""Patterns that name layers, by their full name (as in `adapter`) or the path behind the component:

'attn2.to_k'        every layer whose path ends in it, at a dot
'up_blocks.1.*'     a glob over the whole path
're:.*attn1.*to_v'  a regular expression over the whole path
'block:up.1'        a block: down.0 to down.3, mid, up.0 to up.3, rest, text_encoder;
                    'block:mid/conv' and 'block:mid/linear' only its convolutions or the others
"""

import fnmatch
import re
from collections.abc import Collection
from difflib import get_close_matches

from torch import Size

from lora_sd.parts import TEXT_ATTENTION, TEXT_ENCODERS, TOKENS, block_of, component_of, is_conv

TEXT_LAYERS = (TOKENS, *TEXT_ATTENTION, "mlp.fc1", "mlp.fc2")


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


def is_meant(pattern: str, name: str, shape: Size) -> bool:
    """Whether a pattern names a layer; a token table only by its own name."""
    if name.endswith(TOKENS) and not pattern.endswith(TOKENS):
        return False
    return matches(pattern, name, is_conv(shape))


def invalid_pattern(pattern: str) -> str:
    """The sentence about a pattern that is no valid regular expression; '' when it is fine."""
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            return f"'{pattern}' is not a valid regular expression: {error}."
    return ""


def nearest_layers(pattern: str, layers: Collection[str]) -> str:
    """' Did you mean ...?' with the nearest path endings of as many parts as the pattern has."""
    if pattern.startswith("block:"):
        blocks = dict.fromkeys(block_of(name) for name in layers)
        return f" The blocks are {', '.join(blocks)}."
    no_text = not any(component_of(name) in TEXT_ENCODERS for name in layers)
    if no_text and pattern.endswith(TEXT_LAYERS):
        return " It names layers of the text encoder: turn on adapter.text_encoder."
    depth = pattern.count(".") + 1
    endings = sorted({".".join(name.split(".")[-depth:]) for name in layers})
    near = get_close_matches(pattern.removeprefix("re:"), endings, n=2, cutoff=0.0)
    return f" Did you mean {' or '.join(repr(one) for one in near)}?" if near else ""
