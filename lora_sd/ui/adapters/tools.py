"""What the Adapters tab does with adapter files, by the functions of the verbs.

Sentences of the verbs name paths of this machine; here they get the names that the page knows.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd import durable
from lora_sd.errors import AdapterError, BaseModelError, UserError, shown_size
from lora_sd.ui.adapters.library import checked_name
from lora_sd.ui.adapters.offered import (
    UPLOAD_MARK,
    OfferedAdapter,
    download_copy,
    download_place,
    find_adapter,
    free_file,
    said_file,
)
from lora_sd.ui.texts import say
from lora_sd.verbs.arguments import Watch

if TYPE_CHECKING:
    from lora_sd.algebra.similarity import Similarity
    from lora_sd.verbs.inspect import Inspection
    from lora_sd.verify import Report

FORMATS = ("kohya", "diffusers")
PRIVATE_KEYS = ("lora_sd.config", "lora_sd.loss_curve", "modelspec.thumbnail", "ss_tag_frequency")
FLAGS = {"--base": "adapters.base", "--rank": "adapters.rank", "--energy": "adapters.energy"}
OF_THE_FILE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.date")


@dataclass(frozen=True)
class Made:
    """An adapter file that was made of others.

    Attributes:
        facts: short phrases on it.
        notices: sentences for the user.
    """

    adapter: OfferedAdapter
    facts: list[str]
    notices: list[str]


@dataclass(frozen=True)
class BakedModel:
    """A base model that adapters were put into, and where it is: 'models/cat'."""

    place: str
    facts: list[str]
    notices: list[str]


@dataclass(frozen=True)
class Compared:
    """Two adapters beside each other.

    Attributes:
        settings: (name, value of the first, of the second) where they differ.
    """

    names: tuple[str, str]
    similarity: "Similarity"
    settings: list[tuple[str, str, str]]


def inspect_file(adapter: OfferedAdapter, watch: Watch) -> "Inspection":
    """What is in a file, in numbers; relative to its base's weights where they are here.

    Raises:
        UserError: it cannot be read.
    """
    from lora_sd.verbs.inspect import inspect

    with plain(adapter):
        return inspect(adapter.file, weights_of(adapter) or reading_base(adapter), watch=watch)


def verify_file(adapter: OfferedAdapter) -> "tuple[str, Report]":
    """(family, what each program would load of a file).

    Raises:
        UserError: it cannot be read.
    """
    from lora_sd.verbs.verify import verify

    with plain(adapter):
        return verify(adapter.file, reading_base(adapter))


def compare_files(first: OfferedAdapter, second: OfferedAdapter, watch: Watch) -> Compared:
    """How alike two files are, and which of their settings differ.

    Raises:
        UserError: one cannot be read, or they belong to different models.
    """
    from functools import partial

    from lora_sd.algebra.similarity import similarity
    from lora_sd.verbs.source import read_source

    with plain(first, second):
        one, other = (read_source(each.file, reading_base(each)) for each in (first, second))
        if one.family != other.family:
            raise AdapterError(
                say("adapters.different_models", first=one.family, second=other.family)
            )
        alike = similarity(one.adapter, other.adapter, partial(watch, what="compare"))
    settings = different_settings(one.adapter.metadata, other.adapter.metadata)
    return Compared((first.label, second.label), alike, settings)


def combine_files(
    outputs: Path,
    parts: Sequence[tuple[OfferedAdapter, float]],
    name: object,
    rank: int | None,
    watch: Watch,
) -> Made:
    """One adapter of several, each at its scale.

    Args:
        rank: None: exact.

    Raises:
        UserError: the name cannot be, a file cannot be read, or they belong to different models.
    """
    from lora_sd.algebra.spectrum import span
    from lora_sd.parts import Scales
    from lora_sd.verbs.combine import combine

    adapters = [adapter for adapter, _ in parts]
    with _new_file(outputs, name, adapters) as target:
        done = combine(
            [(adapter.file, Scales(scale)) for adapter, scale in parts],
            target,
            rank=rank,
            base=weights_of(adapters[0]) or reading_base(adapters[0]),
            watch=watch,
        )
    ranks = span([layer.rank for layer in done.adapter.layers.values()])
    said = say("adapters.exact") if done.exact else done.error.sentence()
    return _made(outputs, target, [say("adapters.ranks", ranks=ranks), said], done.notices)


def resize_file(
    outputs: Path,
    adapter: OfferedAdapter,
    name: object,
    limit: Mapping[str, Any],
    watch: Watch,
) -> Made:
    """An adapter at a lower rank.

    Args:
        limit: one or several of `rank`, `energy` and `size_bytes`, as of the verb.

    Raises:
        UserError: the name cannot be, the file cannot be read, or the size cannot be reached.
    """
    from lora_sd.algebra.spectrum import span
    from lora_sd.verbs.resize import resize

    with _new_file(outputs, name, [adapter]) as target:
        done = resize(adapter.file, target, base=reading_base(adapter), watch=watch, **limit)
    ranks = span([layer.rank for layer in done.adapter.layers.values()])
    facts = [say("adapters.ranks", ranks=ranks), done.error.sentence()]
    return _made(outputs, target, facts, done.notices)


def bake_files(
    models: Path,
    base: str,
    parts: Sequence[tuple[OfferedAdapter, float]],
    name: object,
    single_file: bool,
    watch: Watch,
) -> BakedModel:
    """A base model with adapters in it, beside the base models that are offered.

    Args:
        models: their folder.
        base: '': the one that the first adapter was trained on.

    Raises:
        UserError: the name cannot be or is taken, or something cannot be read or written.
    """
    from lora_sd.parts import Scales
    from lora_sd.verbs.bake import bake, told

    adapters = [adapter for adapter, _ in parts]
    chosen = checked_name(name) + (".safetensors" if single_file else "")
    target = models / chosen
    named = base or weights_of(adapters[0])
    if named is None:
        raise AdapterError(say("adapters.no_base"))
    if os.path.lexists(target):
        raise AdapterError(say("adapters.taken", name=chosen))
    with plain(*adapters, other={target: chosen}):
        models.mkdir(exist_ok=True)
        sources = [(adapter.file, Scales(scale)) for adapter, scale in parts]
        done = bake(named, sources, target, watch=watch)
        facts = [say("adapters.baked_layers", layers=done.layers), shown_size(done.size_bytes)]
        notices = _named([*done.notes, *told(done)], {one.file: one.label for one in adapters})
    return BakedModel(f"{models.name}/{chosen}", facts, notices)


def converted(adapter: OfferedAdapter, format: object) -> tuple[Path, list[str]]:
    """(a copy that can be downloaded, sentences on what is otherwise in it).

    Args:
        format: one of FORMATS; anything else: as the file is.

    Raises:
        UserError: it cannot be read, or the format cannot hold it.
    """
    from lora_sd.verbs.convert import convert
    from lora_sd.verbs.source import format_of

    with plain(adapter):
        if format not in FORMATS or format_of(adapter.file) == format:
            return download_copy(adapter), []
        stem = adapter.file_name.removesuffix(".safetensors")
        target = download_place(adapter) / f"{stem}-{format}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        with plain(other={target: target.name}):
            done = convert(
                adapter.file,
                target,
                format=str(format),
                base=reading_base(adapter),
                overwrite=True,
            )
        return target, _named(done.notices, {adapter.file: adapter.label, target: target.name})


def reading_base(adapter: OfferedAdapter) -> str | None:
    """The base to read a file by: None where its layers tell."""
    from lora_sd.formats.families import detect_family

    try:
        detect_family(adapter.file)
        return None
    except AdapterError:
        return adapter.said_base() or None


def weights_of(adapter: OfferedAdapter) -> str | None:
    """The base whose weights a file was trained on, where they are on this machine."""
    from lora_sd.base_files import open_base
    from lora_sd.formats.families import detect_family

    try:
        named = adapter.base() or detect_family(adapter.file)
        open_base(named)
        return named
    except (AdapterError, BaseModelError):
        return None


def different_settings(
    first: Mapping[str, str], second: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """(name, value, other value) of what two files say of their training, where it differs."""
    one, other = _settings(first), _settings(second)
    names = [*one, *(name for name in other if name not in one)]
    absent = "–"
    return [
        (name, one.get(name, absent), other.get(name, absent))
        for name in names
        if one.get(name) != other.get(name)
    ]


def _settings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Ours by their names in the config; of another trainer's file what it says."""
    try:
        groups = json.loads(metadata["lora_sd.config"])
        return {
            f"{group}.{name}": json.dumps(value, ensure_ascii=False)
            for group, values in groups.items()
            for name, value in values.items()
        }
    except (KeyError, ValueError, AttributeError, RecursionError):
        hidden = {*PRIVATE_KEYS, *OF_THE_FILE}
        return {key: text for key, text in sorted(metadata.items()) if key not in hidden}


@contextmanager
def plain(*adapters: OfferedAdapter, other: Mapping[Path, str] | None = None) -> Iterator[None]:
    """Errors raised inside name the adapters as the page does, and no path of this machine."""
    names = {adapter.file: adapter.label for adapter in adapters} | dict(other or {})
    try:
        yield
    except UserError as error:
        raise AdapterError(_named(error.problems, names)) from None
    except FileNotFoundError:
        gone = ", ".join(names.values())
        raise AdapterError(say("adapters.no_longer", name=gone)) from None
    except OSError as error:
        raise AdapterError(say("adapters.not_read", why=error.strerror or error)) from None


def _named(sentences: Sequence[str], names: Mapping[Path, str]) -> list[str]:
    labels = {flag: f"'{say(key)}'" for flag, key in FLAGS.items()}
    found = list(sentences)
    for words, name in [*((str(path), name) for path, name in names.items()), *labels.items()]:
        found = [one.replace(words, name) for one in found]
    return found


@contextmanager
def _new_file(outputs: Path, name: object, adapters: Sequence[OfferedAdapter]) -> Iterator[Path]:
    """Where a result goes, under the name wished for; removed again when it is not right."""
    wished = checked_name(name)
    target = free_file(outputs, wished)
    if target.stem != wished:
        raise AdapterError(say("adapters.taken", name=wished))
    try:
        with plain(*adapters, other={target: target.name}):
            yield target
    except BaseException:
        target.unlink(missing_ok=True)
        raise
    if base := next((said for adapter in adapters if (said := adapter.base())), ""):
        durable.write_text(said_file(target), json.dumps({"base": base}))


def _made(outputs: Path, target: Path, facts: Sequence[str], notices: Sequence[str]) -> Made:
    size = shown_size(target.stat().st_size)
    shown = _named(notices, {target: target.name})
    return Made(find_adapter(outputs, UPLOAD_MARK + target.stem), [size, *facts], shown)
