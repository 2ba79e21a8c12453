"""The cards of the Adapters tab: one for each run and each imported file, read from their folders
and from the headers of their files alone."""

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from PIL import Image

from lora_sd.config import config_from_values, read_yaml
from lora_sd.errors import AdapterError, RunError, UserError
from lora_sd.run_folder import RunFolder, list_runs, open_run
from lora_sd.ui.adapters.offered import UPLOAD_MARK, OfferedAdapter, adapters_of, imported
from lora_sd.ui.metrics import Points, read_course

THUMBNAIL_PX = 192
MOST_THUMBNAIL = 1_000_000  # bytes of one inside a file's metadata
BASES = {
    "sd_v1": "SD 1.5", "sd_v2": "SD 2", "sd_v2_v": "SD 2", "sdxl_base_v1-0": "SDXL",
    "sd15": "SD 1.5", "sd21": "SD 2", "sdxl": "SDXL",
}  # fmt: skip
DOWNS = ("lora_down.weight", "lora_A.weight", "lora.down.weight")


@dataclass(frozen=True)
class FileFacts:
    """What an adapter file says of itself.

    Attributes:
        rank: '8', or '4-16' where its layers differ.
        base: as a person would call it.
        thumbnail: a picture as a data URI.
    """

    rank: str = ""
    base: str = ""
    trigger: str = ""
    date: str = ""
    thumbnail: str = ""
    losses: Points = ()
    problem: str = ""


@dataclass(frozen=True)
class Card:
    """A run or an imported file.

    Attributes:
        id: the run's name, or 'upload:name'.
        versions: its adapters, the one to choose first; none for a run that has saved none.
        thumbnail: a picture as a data URI, or ''.
        file_bytes: size of the first version.
    """

    id: str
    name: str
    is_run: bool
    versions: tuple[OfferedAdapter, ...]
    facts: FileFacts
    file_bytes: int

    def matches(self, words: Sequence[str]) -> bool:
        """Whether every word is in its name, trigger word or base."""
        text = f"{self.name} {self.facts.trigger} {self.facts.base}".lower()
        return all(word in text for word in words)


def item_of(adapter_id: object) -> str:
    """The card's id, of an adapter's: 'cat' of 'cat/step_000100'."""
    return adapter_id.partition("/")[0] if isinstance(adapter_id, str) else ""


def all_cards(outputs: Path) -> list[Card]:
    """Runs, the one last written to first, then imported files."""
    runs = [_run_card(run) for run in list_runs(outputs)]
    return runs + [_file_card(adapter) for adapter in imported(outputs)]


def find_card(outputs: Path, item: str) -> Card | None:
    """The card of that id."""
    if item.startswith(UPLOAD_MARK):
        return next((_file_card(one) for one in imported(outputs) if one.id == item), None)
    try:
        return _run_card(open_run(outputs, item))
    except RunError:
        return None


def _run_card(run: RunFolder) -> Card:
    versions = tuple(adapters_of(run))
    facts, size = _facts(versions)
    losses = facts.losses or read_course(run.metrics_file).loss
    made = run.config_file.stat()
    said = _read_config(str(run.config_file), made.st_mtime_ns)
    return Card(
        run.name,
        run.name,
        True,
        versions,
        FileFacts(
            rank=facts.rank or said.rank,
            base=said.base or facts.base,
            trigger=said.trigger or facts.trigger,
            date=_day(made.st_mtime),
            thumbnail=_newest_sample(run) or facts.thumbnail,
            losses=losses,
            problem=facts.problem,
        ),
        size,
    )


@lru_cache(maxsize=1024)
def _read_config(path: str, changed_ns: int) -> FileFacts:
    """What a run's settings say."""
    try:
        config = config_from_values(read_yaml(Path(path)))
    except UserError:
        return FileFacts()
    return FileFacts(
        rank=str(config.adapter.rank),
        base=_base_words(config.base.model),
        trigger=config.data.trigger_word or "",
    )


def _file_card(adapter: OfferedAdapter) -> Card:
    facts, size = _facts((adapter,))
    said = _base_words(adapter.said_base())
    facts = facts if not said else FileFacts(**{**vars(facts), "base": said})
    return Card(adapter.id, adapter.id.removeprefix(UPLOAD_MARK), False, (adapter,), facts, size)


def _facts(versions: Sequence[OfferedAdapter]) -> tuple[FileFacts, int]:
    """Of the first version, and its size; nothing for none, or one that has just gone."""
    try:
        stamp = versions[0].stamp()
    except (IndexError, OSError):
        return FileFacts(), 0
    return _read_facts(*stamp), stamp[2]


@lru_cache(maxsize=1024)
def _read_facts(path: str, changed_ns: int, size: int) -> FileFacts:
    from lora_sd.formats.safetensors_file import read_header

    try:
        header = read_header(Path(path))
    except AdapterError as error:
        return FileFacts(problem=error.problems[0].replace(path, Path(path).name))
    said = header.metadata
    ranks = [
        entry.shape[0]
        for name, entry in header.tensors.items()
        if name.endswith(DOWNS) and entry.shape
    ]
    ends = sorted({min(ranks), max(ranks)}) if ranks else []
    base = said.get("ss_base_model_version", "")
    return FileFacts(
        rank="-".join(map(str, ends)),
        base=_base_words(base) or _base_words(said.get("ss_sd_model_name", "")),
        trigger=said.get("modelspec.trigger_phrase", "")[:200],
        date=said.get("modelspec.date", "")[:10] or _day(changed_ns / 1e9),
        thumbnail=_own_thumbnail(said),
        losses=_own_losses(said),
    )


def _base_words(name: str) -> str:
    """'SD 1.5' for a family, the last part of a path, or a hub's id as it is."""
    if name in BASES:
        return BASES[name]
    return Path(name).name if name.startswith(("/", "~", ".")) or "\\" in name else name[:80]


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _newest_sample(run: RunFolder) -> str:
    """The first picture of the last step that has any."""
    samples = run.sample_files()
    first = [file for file in samples if file.stem.endswith("_00")]
    try:
        stamp = first[-1].stat()
        return _sample(str(first[-1]), stamp.st_mtime_ns)
    except (IndexError, OSError, SyntaxError):  # none, or one that is still being written
        return ""


@lru_cache(maxsize=1024)
def _sample(path: str, changed_ns: int) -> str:
    with Image.open(path, formats=("PNG",)) as opened:
        return _as_uri(opened)


def _own_thumbnail(metadata: Mapping[str, str]) -> str:
    """That in the metadata, read and written anew: a file may come from anywhere."""
    text = metadata.get("modelspec.thumbnail", "")
    if not text.startswith("data:image/") or len(text) > MOST_THUMBNAIL:
        return ""
    try:
        data = base64.b64decode(text.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as opened:
            return _as_uri(opened) if math.prod(opened.size) <= 4_000_000 else ""
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return ""


def _as_uri(opened: Image.Image) -> str:
    picture = opened.convert("RGB")
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _own_losses(metadata: Mapping[str, str]) -> Points:
    """The loss curve that a file of ours carries."""
    try:
        points = json.loads(metadata.get("lora_sd.loss_curve", "[]"))[:200]
        curve = [(int(step), float(loss)) for step, loss in points]
    except (ValueError, TypeError, RecursionError, OverflowError):
        return ()
    return [point for point in curve if math.isfinite(point[1])]
