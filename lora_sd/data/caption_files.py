"""Captions in files: .txt and .caption beside a picture, metadata.jsonl and metadata.csv."""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lora_sd.data.findings import Finding

SUFFIXES = (".txt", ".caption")  # in the order in which they count
METADATA = ("metadata.jsonl", "metadata.csv")
COLUMNS = ("text", "caption", "prompt")
NO_COLUMN = "has lines without 'text', 'caption' or 'prompt'"
TWICE = "has several captions of one picture: the first counts"
MOST_LINES = 5  # named of one file
MOST_CAPTION_BYTES = 10**6
MOST_METADATA_BYTES = 10**8


class UnreadableCaption(Exception):
    """Why a caption cannot be used: `reason` goes into a sentence after the file's name."""

    def __init__(self, reason: str, detail: str = "", advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.advice = reason, detail, advice

    def of(self, file: Path, before: str = "") -> Finding:
        """What to tell of a file; `before` goes before the reason."""
        return Finding(file, before + self.reason, self.detail, self.advice)


@dataclass
class Metadata:
    """What a metadata file says: `captions` by the picture's path inside the file's folder, in
    NFC."""

    captions: dict[str, str] = field(default_factory=dict)
    problems: list[Finding] = field(default_factory=list)
    notices: list[Finding] = field(default_factory=list)


def read_text(file: Path, most_bytes: int = MOST_CAPTION_BYTES) -> str:
    """A file in UTF-8, or in UTF-16 with its mark.

    Raises:
        UnreadableCaption: it cannot be read, is too large, or is not such text.
    """
    try:
        if not file.is_file():
            raise UnreadableCaption("is not a regular file")
        if file.stat().st_size > most_bytes:
            raise UnreadableCaption(f"is larger than {most_bytes // 10**6} MB: is it a caption?")
        data = file.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UnreadableCaption(f"cannot be read: {reason}") from None
    marked = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    if b"\0" in data and not marked:
        raise UnreadableCaption(
            "is not text in UTF-8", "it holds zero bytes, as UTF-16 does", "Save it as UTF-8."
        )
    try:
        text = data.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableCaption(
            "is not text in UTF-8",
            f"byte 0x{data[error.start]:02x} at place {error.start + 1}",
            "It may be in an older encoding, such as Windows-1252 or Shift-JIS: save it as UTF-8.",
        ) from None
    if "\0" in text:
        raise UnreadableCaption("is not text", "it holds zero characters", "Save it as UTF-8.")
    return text


def tidy(text: str, keep_lines: bool = False) -> str:
    """A caption with single spaces: on one line, or with its lines kept but for empty ones."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    return ("\n" if keep_lines else " ").join(line for line in lines if line)


def read_own(file: Path, keep_lines: bool = False, may_be_empty: bool = False) -> str:
    """The caption in a picture's own caption file.

    Raises:
        UnreadableCaption: as `read_text`, or empty where it may not be.
    """
    caption = tidy(read_text(file), keep_lines)
    if not caption and not may_be_empty:
        raise UnreadableCaption(
            "is empty",
            advice="Write a caption into it, or let `python -m lora_sd caption` do that; where the "
            "setting 'caption' is given as empty, it counts as it is.",
        )
    return caption


def is_empty(file: Path) -> bool:
    """Whether a caption file can be read and holds no caption."""
    try:
        return not tidy(read_text(file))
    except UnreadableCaption:
        return False


def read_metadata(file: Path, keep_lines: bool = False, may_be_empty: bool = False) -> Metadata:
    """The captions of a metadata.jsonl or metadata.csv as Hugging Face's imagefolder takes them.

    A row holds 'file_name', relative to the file's folder, and 'text', 'caption' or 'prompt'.
    """
    found = Metadata()
    try:
        text = read_text(file, MOST_METADATA_BYTES)
    except UnreadableCaption as error:
        found.problems.append(error.of(file))
        return found
    wrong: dict[str, list[str]] = {}
    for line, row in _csv_rows(text) if file.suffix.lower() == ".csv" else _json_rows(text):
        if isinstance(row, str):
            wrong.setdefault("has broken lines", []).append(f"line {line}: {row}")
            continue
        name, caption = row.get("file_name"), next((row[c] for c in COLUMNS if c in row), None)
        if not isinstance(name, str) or not name:
            wrong.setdefault("has lines without 'file_name'", []).append(f"line {line}")
        elif caption is None:
            wrong.setdefault(NO_COLUMN, []).append(f"line {line}")
        elif not isinstance(caption, str) or not is_unicode(caption):
            wrong.setdefault("has captions that are not text", []).append(f"line {line}")
        elif not (caption := tidy(caption, keep_lines)) and not may_be_empty:
            wrong.setdefault("has empty captions", []).append(f"line {line}")
        elif found.captions.setdefault(path_key(name), caption) != caption:
            wrong.setdefault(TWICE, []).append(f"line {line}")
    for reason, lines in wrong.items():
        more = f" and {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
        told = found.notices if reason in (NO_COLUMN, TWICE) else found.problems
        told.append(Finding(file, reason, "; ".join(lines[:MOST_LINES]) + more))
    return found


def path_key(name: str) -> str:
    """A path as the same text however it is written: '/', no './', and composed letters."""
    return unicodedata.normalize("NFC", str(PurePosixPath(name.replace("\\", "/"))))


def is_unicode(text: str) -> bool:
    """Whether text can be written as UTF-8: half of a pair from JSON or a file's name cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, the row or what is wrong with it)."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also of a number of too many digits
            yield number, f"not JSON: {getattr(error, 'msg', error)}"
            continue
        yield number, row if isinstance(row, dict) else "not a JSON object"


def _csv_rows(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, the row or what is wrong with it)."""
    rows = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in rows:
            whole = None not in row and None not in row.values()
            yield rows.line_num, row if whole else "not as many columns as the first line"
    except csv.Error as error:
        yield rows.line_num, f"not CSV: {error}"
