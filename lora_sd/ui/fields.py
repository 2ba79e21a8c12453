"""Config settings as form fields: their names, ranges and help come from config.py alone."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import gradio as gr
from gradio.components import Component
from pydantic.fields import FieldInfo

from lora_sd.config import Config, Resolution, config_from_values, settings
from lora_sd.errors import ConfigError
from lora_sd.ui.texts import say, translated

MOST_TEXT = 20_000  # characters of one field: more is no setting
NOT_ON_THE_PAGE = ("data.folders", "data.cache_folder", "output.folder")
"""What names places on this machine, which no page may; `data.folders` has parts of its own."""
FIELDS: dict[str, FieldInfo] = {
    name: field for name, field in settings() if name not in NOT_ON_THE_PAGE
}


_NAMES = re.compile(
    r"'?\b((?:base|data|adapter|train|optimizer|objective|memory|sample|output)\.\w+)(?:\.\d+)?\b'?"
)
_LOOK_ALIKE = str.maketrans({"*": "\u2217", "`": "'", "[": "(", "]": ")"})
_NAME = re.compile(r"'([a-z0-9_]+\.\w+)(?:\.\d+)?'")


class FormError(ConfigError):
    """Settings of a form that cannot be used.

    Attributes:
        by_field: what is wrong with single fields, a sentence each, by setting.
        others: sentences on several fields together.
    """

    def __init__(self, problems: Sequence[str], by_field: Mapping[str, str] | None = None) -> None:
        self.by_field: dict[str, str] = {**(by_field or {})}
        self.others: list[str] = []
        for problem in problems:
            named = _NAME.match(problem)
            if named and named[1] in FIELDS:
                self.by_field.setdefault(named[1], in_page_words(problem))
            else:
                self.others.append(in_page_words(problem))
        super().__init__([*self.by_field.values(), *self.others])


def label(name: str) -> str:
    """'Learning rate' for 'optimizer.learning_rate'; also of a part of the form that is none."""
    return say(f"fields.label.{name}")


def help_text(name: str) -> str:
    """The setting's help, then its range where it has one worth telling."""
    if name not in FIELDS:
        return say(f"fields.help.{name}")
    said = translated(f"fields.help.{name}")
    text = _names_as_labels(name, said or " ".join((FIELDS[name].description or "").split()))
    text = text.replace("*", "\u2217")
    low, high = _bound(name, "ge", "gt"), _bound(name, "le", "lt")
    if low is None or high is None or high >= 1_000_000 or low == high:
        return text
    above = any(getattr(part, "gt", None) is not None for part in FIELDS[name].metadata)
    shown = say(f"fields.range{'_above' if above else ''}", low=f"{low:g}", high=f"{high:g}")
    return f"{text} {shown}"


def as_plain(text: str) -> str:
    """Text for the line below a label, where Gradio escapes HTML, but takes some signs for Markdown
    and knows no way around it: they become signs that look like them."""
    return text.translate(_LOOK_ALIKE)


def component(name: str, value: Any, **options: Any) -> Component:
    """The form field of a setting, showing `value`, as a configuration has it."""
    return component_showing(name, shown_value(name, value), **options)


def component_showing(name: str, shown: Any, **options: Any) -> Component:
    """The form field of a setting that holds `shown`."""
    kind = _kind(name)
    shared = {
        "label": label(name),
        "info": help_text(name),
        "elem_id": name.replace(".", "-"),
        **options,
    }
    if get_origin(kind) is Literal:
        return gr.Dropdown(list(get_args(kind)), value=shown, **shared)
    if kind is bool:
        return gr.Checkbox(shown, **shared)
    if kind in (int, float) and not _may_be_empty(name):
        is_share = kind is float and (_bound(name, "le", "lt") or 2) <= 1
        return gr.Number(shown, step=0.01 if is_share else 1, **shared)
    return gr.Textbox(shown, **{"lines": 2 if kind == list[str] else 1, **shared})


def shown_value(name: str, value: Any) -> Any:
    """What the field of a setting holds where the setting is `value`."""
    kind = _kind(name)
    if get_origin(kind) is list:
        return ("\n" if kind == list[str] else ", ").join(map(_plain, value))
    if kind in (int, float) and _may_be_empty(name):  # Gradio's number field turns empty into 0
        return "" if value is None else _plain(value)
    return "" if value is None else value


def config_from_form(form: Mapping[str, Any], extra: Mapping[str, Any] | None = None) -> Config:
    """The checked configuration of field values by dotted name.

    The browser is not trusted: whatever is not of the setting's own type is a problem too.

    Args:
        extra: values of the app's own, such as paths.

    Raises:
        FormError: all problems at once, each naming the field as the page does.
    """
    values: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name, raw in form.items():
        group, _, key = name.partition(".")
        try:
            values.setdefault(group, {})[key] = _value(name, raw)
        except ValueError as error:
            problems.append(str(error))
    for name, value in (extra or {}).items():
        group, _, key = name.partition(".")
        values.setdefault(group, {})[key] = value
    try:
        config = config_from_values(values)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise FormError(problems)
    return config


def is_value(name: str, raw: object) -> bool:
    """Whether a field could hold that, whatever else is set."""
    try:
        value = _value(name, raw)
    except ValueError:
        return False
    kind = _kind(name)
    return get_origin(kind) is not Literal or value in get_args(kind)


def in_page_words(sentence: str) -> str:
    """A sentence of config.py with the fields named as on the page."""
    return _NAMES.sub(
        lambda found: f"'{label(found[1])}'" if found[1] in FIELDS else found[0], sentence
    )


def form_values(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """The values of a configuration by dotted name."""
    groups = config.model_dump()
    return {name: groups[name.partition(".")[0]][name.partition(".")[2]] for name in names}


def _kind(name: str) -> Any:
    """The setting's type, without the None of an optional one."""
    annotation = FIELDS[name].annotation
    if get_origin(annotation) is Literal or get_origin(annotation) is list:
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if kinds else annotation


def _value(name: str, raw: Any) -> Any:
    kind = _kind(name)
    if get_origin(kind) is Literal and type(raw) is int:
        return raw
    if kind is bool:
        if not isinstance(raw, bool):
            raise ValueError(_problem("switch", name))
        return raw
    if kind in (int, float):
        if _may_be_empty(name) and (raw is None or raw == ""):
            return None
        return _number(name, raw, whole=kind is int)
    if not isinstance(raw, str | None):
        raise ValueError(_problem("text", name))
    text = (raw or "").strip()
    if len(text) > MOST_TEXT or "\0" in text:
        raise ValueError(_problem("text_long", name, most=MOST_TEXT))
    if get_origin(kind) is list:
        if get_args(kind) == (str,):
            return [line.strip() for line in text.splitlines() if line.strip()]
        whole = kind == list[Resolution]
        return [_number(name, part, whole) for part in text.replace(",", " ").split()]
    return text or (None if _may_be_empty(name) else "")


def _may_be_empty(name: str) -> bool:
    return NoneType in get_args(FIELDS[name].annotation)


def _number(name: str, raw: Any, whole: bool) -> int | float:
    if isinstance(raw, str):
        try:
            raw = float(raw)
        except ValueError:
            raise ValueError(_problem("no_number", name, found=raw[:40])) from None
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError(_problem("empty", name))
    if not math.isfinite(raw):
        raise ValueError(_problem("finite", name))
    if whole and raw != int(raw):
        raise ValueError(_problem("whole", name, found=f"{raw:g}"))
    return int(raw) if whole else float(raw)


def _problem(kind: str, name: str, **values: Any) -> str:
    """A sentence on a setting, which it calls by its dotted name until it is shown."""
    return say(f"fields.problem.{kind}", name=name, **values)


def _names_as_labels(name: str, text: str) -> str:
    """A setting's help with the other settings of its group called as on the page."""
    group = name.partition(".")[0]
    return re.sub(
        r"\b[a-z]+(?:_[a-z0-9]+)+\b",
        lambda found: (
            f"'{label(f'{group}.{found[0]}')}'" if f"{group}.{found[0]}" in FIELDS else found[0]
        ),
        in_page_words(text),
    )


def _plain(entry: Any) -> str:
    return f"{entry:g}" if isinstance(entry, float) else str(entry)


def _bound(name: str, *kinds: str) -> float | None:
    for part in FIELDS[name].metadata:
        for kind in kinds:
            if getattr(part, kind, None) is not None:
                return float(getattr(part, kind))
    return None
