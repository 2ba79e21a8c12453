"""Everything the app says, by key and language: one file a language, `en.yaml` first.

A translation is one more file beside it. What it lacks is said in English.
"""

from functools import cache
from pathlib import Path
from typing import Any

import yaml

ENGLISH = "en"
FOLDER = Path(__file__).parent
_chosen = ENGLISH


def languages() -> list[str]:
    """The languages there are, English first."""
    found = {path.name for path in FOLDER.iterdir() if path.is_dir() and path.name[0] != "_"}
    return sorted(found, key=lambda one: (one != ENGLISH, one))


def choose(language: str) -> None:
    """Speak that language from now on; to be called before the page is built.

    Raises:
        ValueError: there is no such file.
    """
    global _chosen
    if language not in languages():
        raise ValueError(f"no texts in '{language}'; there are {', '.join(languages())}")
    _chosen = language


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
    files = sorted((FOLDER / language).glob("*.yaml"))
    return {
        key: text
        for file in files
        for key, text in _flat(yaml.safe_load(file.read_text(encoding="utf-8")), f"{file.stem}.")
    }


def _flat(tree: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in tree.items():
        name = f"{before}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, str(value))]
    return found
