"""Everything the app says, by key and language: English in a folder, a file a section.

A translation is one more file beside it, `zh.yaml`, with the sections as its first keys. What it
lacks is said in English.
"""

import locale
import os
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ENGLISH = "en"
FOLDER = Path(__file__).parent
_chosen = ENGLISH


def languages() -> list[str]:
    """The languages there are, English first."""
    return [ENGLISH, *sorted(path.stem for path in FOLDER.glob("*.yaml"))]


def choose(language: str) -> None:
    """Speak that language from now on; to be called before the page is built.

    Raises:
        ValueError: there are no texts in it.
    """
    global _chosen
    if language not in languages():
        raise ValueError(f"no texts in '{language}'; there are {', '.join(languages())}")
    _chosen = language


def chosen() -> str:
    """The language that is spoken."""
    return _chosen


def of_system() -> str:
    """The language of this system's user, or English where there are no texts in it."""
    names = [os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
    wanted = next(filter(None, names), None) or locale.getlocale()[0] or ENGLISH
    # 'zh_CN.UTF-8', as 'zh-cn' and as 'zh'
    whole = wanted.partition(".")[0].partition("@")[0].replace("_", "-").lower()
    known = {name.lower(): name for name in languages()}
    return known.get(whole) or known.get(whole.partition("-")[0]) or ENGLISH


def say(key: str, /, **values: Any) -> str:
    """The text of a key ('train.start'), with `{name}` replaced by the values.

    Numbers may be formatted in the text: `{step:,}`.

    Raises:
        KeyError: there is no such text.
    """
    text = texts(_chosen).get(key)
    if text is None:
        text = texts(ENGLISH)[key]
    return text.format(**values) if values else text


def translated(key: str) -> str | None:
    """The text of a key that English need not have, as a setting's help; None: there is none."""
    return texts(_chosen).get(key)


@cache
def texts(language: str) -> dict[str, str]:
    """All texts of a language by dotted key."""
    files = sorted((FOLDER / ENGLISH).glob("*.yaml"))
    if language != ENGLISH:
        return dict(_flat(_read(FOLDER / f"{language}.yaml")))
    return {key: text for file in files for key, text in _flat(_read(file), f"{file.stem}.")}


def _read(file: Path) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is there with libyaml alone
    return dict(yaml.load(file.read_text(encoding="utf-8"), loader))


def _flat(tree: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        name = f"{before}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, str(value))]
    return found
