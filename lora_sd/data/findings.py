"""What is wrong or odd with files, told so that five hundred of them can still be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_sd.errors import printable, shown_list

MOST_SHOWN = 20
MOST_ALIKE = 3


@dataclass(frozen=True)
class Finding:
    """One file and what was found.

    `reason` goes into a sentence after its name, and is the same for all files of which it is
    true; `detail` is what only this one has; `advice` is a sentence.
    """

    file: Path
    reason: str
    detail: str = ""
    advice: str = ""

    def __str__(self) -> str:
        return f"'{printable(str(self.file))}' {self.why}"

    @property
    def why(self) -> str:
        """The sentence without the file's name."""
        detail = f" ({printable(self.detail)})" if self.detail else ""
        return f"{self.reason}{detail}. {self.advice}".rstrip()


def counted(number: int, what: str = "picture") -> str:
    """'1 picture', '2 pictures'."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def sentences(findings: Sequence[Finding], most: int = MOST_SHOWN) -> list[str]:
    """A sentence for each; where that were more than `most`, one for all of which the same is
    true, and at last how many are not told."""
    if len(findings) <= most:
        return [str(finding) for finding in findings]
    alike: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        alike.setdefault((finding.reason, finding.advice), []).append(finding)
    told: list[tuple[int, str]] = []  # files, sentence
    for (reason, advice), group in sorted(alike.items(), key=lambda item: -len(item[1])):
        if len(group) <= MOST_ALIKE:
            told += [(1, str(finding)) for finding in group]
            continue
        names = shown_list([str(finding.file) for finding in group])
        told.append(
            (len(group), f"Each of {len(group)} files {reason}: {names}. {advice}".rstrip())
        )
    rest = sum(files for files, _ in told[most:])
    shown = [sentence for _, sentence in told[:most]]
    return [*shown, f"... and {rest} more."] if rest else shown
