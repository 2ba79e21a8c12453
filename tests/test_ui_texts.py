"""The texts: each that is asked for is there, each that is there is asked for, in all languages.

A key may be written out (`say("train.start")`) or made where it is used, with its section written
out (`say(f"train.recipe.{kind}")`) or from a written key and one more word (`say(f"{key}.one")`).
"""

import ast
import re
import string
from pathlib import Path

import pytest
import yaml

from lora_sd.config import settings
from lora_sd.ui import texts

UI = Path(texts.__file__).parent.parent
SOURCES = [ast.parse(path.read_text(encoding="utf-8")) for path in UI.rglob("*.py")]
ENGLISH = texts.texts(texts.ENGLISH)
OTHERS = [language for language in texts.languages() if language != texts.ENGLISH]
HELP = {f"fields.help.{name}" for name, _ in settings()}  # in English they are in config.py


def pattern(made: ast.JoinedStr) -> str:
    """What an f-string may turn out to be."""
    return "".join(
        re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*"
        for part in made.values
    )


def asked(node: ast.AST) -> list[ast.expr]:
    """The keys of a call of `say`, as they are written."""
    if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say" and node.args):
        return []
    first = node.args[0]
    return [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]


NODES = [node for tree in SOURCES for node in ast.walk(tree)]
WRITTEN = {n.value for n in NODES if isinstance(n, ast.Constant) and isinstance(n.value, str)}
MADE = {pattern(node) for node in NODES if isinstance(node, ast.JoinedStr)}
SECTIONS = {key.partition(".")[0] for key in ENGLISH}


def test_what_is_asked_for_is_there() -> None:
    missing = []
    for key in (key for node in NODES for key in asked(node)):
        if isinstance(key, ast.Constant) and key.value not in ENGLISH:
            missing.append(key.value)
        elif isinstance(key, ast.JoinedStr):
            could_be = re.compile(pattern(key))
            if not any(map(could_be.fullmatch, ENGLISH)):
                missing.append(could_be.pattern)
    assert missing == []


def test_what_is_there_is_asked_for() -> None:
    of_a_section = [
        re.compile(made) for made in MADE if made.split("\\.")[0] in SECTIONS and made != ".*"
    ]

    def is_used(key: str) -> bool:
        return (
            key in WRITTEN
            or any(made.fullmatch(key) for made in of_a_section)
            or any(key.startswith(f"{start}.") or key.startswith(f"{start}_") for start in WRITTEN
                   if "." in start and start.partition(".")[0] in SECTIONS)
        )  # fmt: skip

    assert [key for key in ENGLISH if not is_used(key)] == []


def names(text: str) -> set[str]:
    """The {names} that a text is filled with."""
    return {name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_is_whole(language: str) -> None:
    translated = texts.texts(language)
    assert set(ENGLISH) - set(translated) == set()
    assert set(translated) - set(ENGLISH) <= HELP
    for key, text in ENGLISH.items():
        allowed = names(text) | names(ENGLISH.get(re.sub(r"one$", "many", key), ""))
        assert names(translated[key]) <= allowed, key
        assert names(text) <= names(translated[key]) or key.endswith("one"), key


@pytest.mark.parametrize("file", texts.FOLDER.rglob("*.yaml"), ids=lambda file: file.stem)
def test_yaml_reads_every_text_as_text(file: Path) -> None:
    def check(tree: object, place: str) -> None:
        if isinstance(tree, dict):
            for key, value in tree.items():
                assert isinstance(key, str), f"{place}: write '{key}' in quotes"
                check(value, f"{place}.{key}")
        else:
            assert isinstance(tree, str), f"{place}: write it in quotes"

    check(yaml.safe_load(file.read_text(encoding="utf-8")), file.stem)


@pytest.mark.parametrize(
    ("system", "language"),
    [("C", "en"), ("en_GB.UTF-8", "en"), ("xx_YY", "en"), ("zh_CN.UTF-8", "zh"), ("", "en")],
)
def test_the_language_is_the_systems(
    system: str, language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", system)
    assert texts.of_system() == next((one for one in texts.languages() if one == language), "en")


def test_a_language_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="there are en"):
        texts.choose("xx")
