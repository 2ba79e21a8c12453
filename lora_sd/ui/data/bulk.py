"""Captions and their tags, changed many at a time."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from lora_sd.data.caption_files import tidy

BulkKind = Literal["prefix", "suffix", "replace", "remove_tag"]
KINDS: tuple[BulkKind, ...] = get_args(BulkKind)


@dataclass(frozen=True)
class BulkEdit:
    """One change to any caption.

    Args:
        kind: put `text` before or behind, replace it by `by`, or remove it as a tag.
        text: as it stands in captions, upper and lower case as written; of a tag either way.
    """

    kind: BulkKind
    text: str
    by: str = ""

    def of(self, caption: str) -> str:
        """The caption as it would be; each of its lines is changed."""
        lines = caption.splitlines() or [""]
        return tidy("\n".join(map(self._of_line, lines)), keep_lines=True)

    def _of_line(self, line: str) -> str:
        if self.kind == "prefix":
            return line if line.startswith(self.text) else f"{self.text} {line}"
        if self.kind == "suffix":
            if line.endswith(self.text):
                return line
            return line + ("" if self.text.startswith(",") else " ") + self.text
        if self.kind == "replace":
            return line.replace(self.text, self.by)
        tags = split_tags(line)
        kept = [tag for tag in tags if tag.casefold() != self.text.casefold()]
        return line if len(kept) == len(tags) else ", ".join(kept)


def split_tags(line: str) -> list[str]:
    """The tags of a caption, which commas part."""
    return [tag.strip() for tag in line.split(",") if tag.strip()]


def tag_counts(captions: Iterable[str]) -> list[tuple[str, int]]:
    """(tag, how many captions have it) of captions in which commas part tags, most first."""
    counts: Counter[str] = Counter()
    for caption in captions:
        tags = split_tags(caption.replace("\n", ","))
        counts.update(set(tags) if len(tags) > 1 else ())
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))
