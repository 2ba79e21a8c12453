"""Strips and grids: one picture at several scales, by row another checkpoint, prompt or adapter."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lora_sd.ui.adapters.offered import OfferedAdapter
from lora_sd.ui.generate.request import MOST_PROMPT, MOST_SCALE, Checking, Request
from lora_sd.ui.texts import say

Rows = Literal["one", "checkpoints", "prompts", "adapters"]
ROWS: tuple[Rows, ...] = get_args(Rows)
SCALES = "0, 0.25, 0.5, 0.75, 1"
MOST_ROWS, MOST_COLUMNS = 12, 12


@dataclass(frozen=True)
class Grid:
    """What to draw: rows of requests, and what stands beside and above them."""

    cells: list[list[Request]]
    row_labels: list[str]
    column_labels: list[str]


def read_grid(
    request: Request,
    values: Mapping[str, Any],
    find: Callable[[object], OfferedAdapter | None],
    checkpoints: Callable[[OfferedAdapter], list[OfferedAdapter]],
) -> Grid:
    """The grid of a request, whose first adapter is the one that changes; others stay as they are.

    Args:
        values: what the browser sent: 'rows', 'scales', 'row_prompts', 'row_adapters'.
        find: an adapter by its id.
        checkpoints: what else the run of an adapter saved.

    Raises:
        ConfigError: all problems at once.
    """
    checking = Checking(values)
    kind = values.get("rows", "one")
    scales = _scales(checking)
    prompts, adapters = [request.prompt], [request.used[0].adapter]
    if kind == "prompts":
        text = checking.text("row_prompts", say("generate.row_prompts"), MOST_ROWS * MOST_PROMPT)
        prompts = [line.strip() for line in text.splitlines() if line.strip()] or prompts
        if any(len(one) > MOST_PROMPT for one in prompts):
            checking.problems.append(
                say("generate.wrong_text", name=say("generate.prompt"), most=MOST_PROMPT)
            )
    elif kind in ("checkpoints", "adapters"):
        adapters = _adapters(checking, find)
        if kind == "checkpoints" and not adapters:
            adapters = checkpoints(request.used[0].adapter)
        if not adapters:
            checking.problems.append(say("generate.no_rows"))
    elif kind != "one":
        checking.problems.append(say("generate.wrong_rows"))
    if max(len(prompts), len(adapters)) > MOST_ROWS:
        checking.problems.append(say("generate.too_many_rows", most=MOST_ROWS))
    checking.end()
    rows = [
        replace(request.of(adapter), prompt=prompt, count=1)
        for prompt in prompts
        for adapter in adapters
    ]
    labels = [
        one.used[0].adapter.label
        if kind in ("checkpoints", "adapters")
        else one.prompt or say("generate.no_prompt")
        for one in rows
    ]
    return Grid(
        [[row.at_scale(scale) for scale in scales] for row in rows],
        labels,
        [say("generate.at_scale", scale=scale) for scale in scales],
    )


def _scales(checking: Checking) -> list[float]:
    """'0, 0.5, 1' as numbers; without it the usual ones."""
    text = checking.text("scales", say("generate.scales"), 200) or SCALES
    try:
        scales = [float(part) for part in text.replace(",", " ").split()]
        wrong = any(not math.isfinite(one) or not 0 <= one <= MOST_SCALE for one in scales)
    except ValueError:
        wrong, scales = True, []
    if wrong or len(scales) > MOST_COLUMNS:
        checking.problems.append(say("generate.wrong_scales", most=MOST_COLUMNS, high=MOST_SCALE))
    return scales


def _adapters(
    checking: Checking, find: Callable[[object], OfferedAdapter | None]
) -> list[OfferedAdapter]:
    chosen = checking.value("row_adapters") or []
    found = [find(one) for one in chosen[: MOST_ROWS + 1]] if isinstance(chosen, list) else [None]
    if any(one is None for one in found):
        checking.problems.append(say("generate.row_is_gone"))
    return [one for one in found if one is not None]
