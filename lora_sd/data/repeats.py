"""How often an epoch shows what it shows."""

from collections.abc import Sequence
from fractions import Fraction


def showing_rates(repeats: Sequence[float], is_prior: Sequence[bool]) -> list[Fraction]:
    """How often each item is shown in an epoch, on average: its repeats, but those of prior items
    are scaled so that all together are shown as often as all others together."""
    rates = [Fraction(float(one)).limit_denominator(10**6) for one in repeats]
    totals = {prior: Fraction(0) for prior in (False, True)}
    for rate, prior in zip(rates, is_prior, strict=True):
        totals[prior] += rate
    scale = totals[False] / totals[True] if totals[True] else Fraction(1)
    return [rate * scale if prior else rate for rate, prior in zip(rates, is_prior, strict=True)]
