"""Further arguments of an optimizer as a user writes them: 'betas=0.9,0.99', 'd_coef=0.5'."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_sd.errors import ConfigError, nearest

OURS = {
    "lr": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
}
"""Arguments that have settings of their own."""
WORDS = {"true": True, "false": False, "none": None}


def read_options(
    name: str,
    texts: Sequence[str],
    optimizer: type,
    elsewhere: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The arguments that 'NAME=VALUE' texts give, checked against an optimizer's signature.

    A value is a number, true, false, none, or several numbers with commas between.

    Args:
        name: the optimizer's name, for the sentences.
        elsewhere: arguments that are no options here, with the sentence that says what to do.

    Raises:
        ConfigError: a text is no NAME=VALUE, its name is unknown, or its value of another kind
            than the optimizer's default; all problems at once.
    """
    known = _arguments(optimizer)
    options: dict[str, Any] = {}
    problems = []
    for text in texts:
        key, is_pair, written = (part.strip() for part in text.partition("="))
        if not (key and is_pair and written):
            problem = "write NAME=VALUE, such as betas=0.9,0.99"
        elif key in OURS:
            problem = f"set '{OURS[key]}' instead"
        elif elsewhere and key in elsewhere:
            problem = elsewhere[key]
        elif key not in known:
            guess = nearest(key, known) or f" It has {', '.join(known)}."
            problem = f"{name} has no argument '{key}'.{guess}"
        elif key in options:
            problem = f"'{key}' is given twice"
        else:
            value = _value(written)
            problem = _wrong_kind(value, known[key])
            options[key] = value
        if problem:
            problems.append(
                f"'optimizer.options' holds '{text}': {problem.rstrip('.?')}"
                f"{'?' if problem.endswith('?') else '.'}"
            )
    if problems:
        raise ConfigError(problems)
    return options


def _arguments(optimizer: type) -> dict[str, Any]:
    """Arguments by name with their defaults, without those of `OURS`."""
    parameters = inspect.signature(optimizer).parameters.values()
    return {
        one.name: one.default
        for one in parameters
        if one.default is not one.empty and one.name not in OURS
    }


def _value(written: str) -> Any:
    """What a text means; itself where it means no number, word or list of numbers."""
    if "," in written:
        return tuple(_value(part.strip()) for part in written.split(",") if part.strip())
    if written.lower() in WORDS:
        return WORDS[written.lower()]
    for read in (int, float):
        try:
            return read(written)
        except ValueError:
            pass
    return written


def _wrong_kind(value: Any, default: Any) -> str:
    """The sentence about a value that cannot stand for such a default; '' when it can."""
    many = value if isinstance(value, tuple) else (value,)
    if any(isinstance(one, str) or _is_nan(one) for one in many):
        return "a number, true, false or none is expected"
    if isinstance(default, tuple) and len(many) != len(default):
        shown = ",".join(f"{one:g}" if _is_number(one) else str(one).lower() for one in default)
        return f"{len(default)} numbers are expected, such as {shown}"
    if isinstance(default, bool) and not isinstance(value, bool):
        return "true or false is expected"
    if _is_number(default) and not _is_number(value) and value is not None:
        return f"one number is expected, such as {default:g}"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
