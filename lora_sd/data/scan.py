"""Decode every picture of a folder once, in threads, and remember by content what was found."""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image

from lora_sd import durable
from lora_sd.data import images
from lora_sd.data.images import Facts, UnreadableImage
from lora_sd.data.room import room_for
from lora_sd.errors import UserError

MOST_THREADS = 8
INDEX_VERSION = f"1, Pillow {PIL.__version__}"


@dataclass(frozen=True)
class Job:
    """A file to look at: a picture, which `inspect` sees on `background`, or a mask."""

    file: Path
    background: str = "white"
    is_mask: bool = False


@dataclass(frozen=True)
class Scanned:
    """What a file holds: `facts`, or the `problem` that makes it useless."""

    sha256: str = ""
    key: str = ""  # in the index
    facts: Facts | None = None
    problem: tuple[str, str] | None = None  # reason, detail
    inspected: Any = None


class Index:
    """Facts of pictures by the sha256 of their files, kept in a file between runs.

    A file that is damaged or of another version is begun anew. None: kept for this run alone.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.notice = ""
        self._known: dict[str, dict[str, Any]] = {}
        self._changed = False
        if file is None or not file.exists():
            return
        try:
            held = json.loads(file.read_bytes())
            if held["version"] == INDEX_VERSION:
                self._known = dict(held["pictures"])
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            self.notice = f"'{file}' is damaged: every picture is decoded again."

    def get(self, key: str, sha256: str) -> Scanned | None:
        try:
            held = self._known[key]
            if "problem" in held:
                reason, detail = held["problem"]
                return Scanned(sha256, problem=(str(reason), str(detail)))
            width, height = held["size_px"]
            notices = tuple(str(notice) for notice in held["notices"])
            facts = Facts((int(width), int(height)), bool(held["has_alpha"]), notices)
            return Scanned(sha256, facts=facts)
        except (LookupError, TypeError, ValueError):
            return None

    def put(self, scanned: Scanned) -> None:
        """Remember what was found anew."""
        if scanned.key:
            self._changed = True
            held = asdict(scanned.facts) if scanned.facts else {"problem": scanned.problem}
            self._known[scanned.key] = held

    def save(self) -> None:
        if self.file is None or not self._changed:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"version": INDEX_VERSION, "pictures": self._known})
            durable.write_text(self.file, text)
        except (OSError, UserError) as error:
            self.notice = f"What was found is not remembered: {error}"


def scan(
    jobs: Sequence[Job],
    index: Index,
    inspect: Callable[[Image.Image], Any] | None = None,
) -> Iterator[Scanned]:
    """What each file holds, in the order of `jobs`; only a few pictures are in memory at a time.

    With `inspect`, every picture is decoded, and what it gives comes with the rest.
    """
    threads = min(os.cpu_count() or 1, MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Scanned]] = deque()
        rest = iter(jobs)
        try:
            while True:
                for job in rest:
                    waiting.append(pool.submit(_scan, job, index, inspect))
                    if len(waiting) > 4 * threads:
                        break
                if not waiting:
                    return
                scanned = waiting.popleft().result()
                index.put(scanned)
                yield scanned
        finally:
            for future in waiting:
                future.cancel()


def _scan(job: Job, index: Index, inspect: Callable[[Image.Image], Any] | None) -> Scanned:
    sha256 = key = ""
    try:
        data = images.read_bytes(job.file)
        sha256 = hashlib.sha256(data).hexdigest()
        key = f"mask {sha256}" if job.is_mask else sha256
        known = index.get(key, sha256)
        if known and (known.problem or job.is_mask or inspect is None):
            return known
        with room_for(data):
            if job.is_mask:
                return Scanned(sha256, key, facts=Facts(images.decode_mask(data).size, False, ()))
            if inspect is None:
                return Scanned(sha256, key, facts=images.examine(data))
            decoded = images.decode(data, job.background)
            return Scanned(sha256, key, facts=decoded.facts, inspected=inspect(decoded.rgb))
    except UnreadableImage as error:
        return Scanned(sha256, key, problem=(error.reason, error.detail))
    except MemoryError:  # of this moment, so not to be remembered
        return Scanned(problem=("needs more memory than is free", ""))
