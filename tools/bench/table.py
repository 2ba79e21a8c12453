"""Rows of figures with what they are to reach, and how they are printed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tools.bench.rounds import Spread


@dataclass(frozen=True)
class Target:
    """What issue 7 asks for: a figure of at most, at least, or between the two."""

    at_most: float = float("inf")
    at_least: float = float("-inf")

    def is_met(self, figure: float) -> bool:
        """Whether a figure, not rounded, reaches it."""
        return self.at_least <= figure <= self.at_most

    def __str__(self) -> str:
        if self.at_least == float("-inf"):
            return f"<= {self.at_most:.2f}"
        if self.at_most == float("inf"):
            return f">= {self.at_least:.2f}"
        return f"{self.at_least:.2f} to {self.at_most:.2f}"


@dataclass(frozen=True)
class Row:
    """A figure.

    Attributes:
        part: the part of the benchmark; `what`: the figure's name.
        spread: None where it was not measured, and `note` says why.
        unit: '' for a ratio.
    """

    part: str
    what: str
    spread: Spread | None
    unit: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """'met', 'missed', or nothing where there is no target or no figure."""
        if self.target is None or self.spread is None:
            return ""
        return "met" if self.target.is_met(self.spread.median) else "missed"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "part": self.part,
            "what": self.what,
            "spread": None if self.spread is None else asdict(self.spread),
            "unit": self.unit,
            "target": None if self.target is None else str(self.target),
            "verdict": self.verdict,
            "note": self.note,
        }


def table(rows: Sequence[Row]) -> str:
    """The rows as text, under a heading for each part."""
    width = max(len(row.what) for row in rows)
    lines = []
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].part != row.part:
            lines += ["", row.part, "-" * len(row.part)]
        figure = middle = ""
        if row.spread is not None:
            figure = _shown(row.spread.median, row.unit)
            low, high = (_shown(value, row.unit) for value in (row.spread.low, row.spread.high))
            middle = "" if low == high == figure else f"{low} .. {high}"
        target = "" if row.target is None else str(row.target)
        line = (
            f"{row.what:<{width}}  {figure:>9} {row.unit:<8} {middle:<19} {target:<12} "
            f"{row.verdict:<7}{row.note}"
        )
        lines.append(line.rstrip())
    return "\n".join(lines)


def _shown(value: float, unit: str) -> str:
    if not unit:
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
