"""What a training step takes, beside its limit: one case, in this process.

Each side makes one step in turn, of which two stretches are timed: the forward and the backward
pass; and what comes after, AdamW and dropping the gradients (the limit has no optimizer). Gradients
are not clipped, losses not read, and what makes batches is left out, on every side: `whole_run`
measures all of it. A peer whose first step takes over `SLOW` times the limit's makes one more step
and no others: LyCORIS's takes half a minute at Stable Diffusion's size. On the CPU the process
keeps freed memory, as our training does and the peers' does not: on every side, to show in none.

Each side shows that it does the work: all begin at the same loss, as a fresh adapter changes
nothing; the limit's input has a gradient; the trainers train as many weights, and their tensors
have moved at the end.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tools.bench.cases import MINIATURES, Case, build_unet, make_inputs
from tools.bench.errors import BenchError
from tools.bench.rounds import now, take_turns
from tools.bench.sides import PEERS, SIDES, Side, make_side, twin

SAME_LOSS = {"float32": 1e-4, "bfloat16": 3e-2}
"""Relative difference that rounding makes, at most."""
SLOW = 4


def measure_step(case: Case, rounds: int) -> dict[str, Any]:
    """Seconds of a step: by side, by round.

    Returns:
        'passes' and 'whole', each {side: [seconds of a step, in each round]}: forward and backward
        pass, and these with what comes after; 'weights', how many are trained; 'failed', {peer:
        why} of those that cannot do this case.

    Raises:
        BenchError: a side does not do the work.
    """
    unet = build_unet(case)
    inputs = make_inputs(case, unet.config)
    sides: dict[str, Side] = {}
    losses: dict[str, float] = {}
    took: dict[str, float] = {}
    failed = {}
    for name in SIDES:
        try:
            side = make_side(name, twin(unet), inputs, case)
            side.remember()
            began = now(case.device)
            loss = float(side.pull())
            took[name] = now(case.device) - began
        except Exception as error:  # a peer whom torch.compile, or a small GPU, does not take
            if name not in PEERS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        sides[name], losses[name] = side, loss
    _check_start(sides, losses, case)
    for side in sides.values():
        side.learn()

    def turn(side: Side) -> tuple[float, float]:
        began = now(case.device)
        side.pull()
        between = now(case.device)
        side.learn()
        return between - began, now(case.device) - began

    slow = [name for name in sides if took[name] > SLOW * took["limit"] and name in PEERS]
    turns = take_turns(
        {name: partial(turn, side) for name, side in sides.items()},
        rounds,
        warm_up=0,
        once=slow if case.device == "cpu" and case.unet not in MINIATURES else [],
    )
    for side in sides.values():
        _check_moved(side)
    return {
        "passes": {name: [one[0] for one in values] for name, values in turns.items()},
        "whole": {name: [one[1] for one in values] for name, values in turns.items()},
        "weights": side_weights(sides["ours"]),
        "failed": failed,
    }


def side_weights(side: Side) -> int:
    """How many numbers a side trains."""
    return sum(weight.numel() for weight in side.learning)


def _check_start(sides: dict[str, Side], losses: dict[str, float], case: Case) -> None:
    """Same work, same start."""
    gradient = sides["limit"].inputs.latents.grad
    if gradient is None or not _is_alive(gradient):
        raise BenchError("the limit's input has no gradient")
    for name, side in sides.items():
        if not abs(losses[name] / losses["limit"] - 1) <= SAME_LOSS[case.dtype]:
            raise BenchError(
                f"{case.name}: {name} begins at the loss {losses[name]}, the base at "
                f"{losses['limit']}"
            )
        if name != "limit" and side_weights(side) != side_weights(sides["ours"]):
            raise BenchError(
                f"{case.name}: {name} trains {side_weights(side)} weights, ours "
                f"{side_weights(sides['ours'])}"
            )


def _check_moved(side: Side) -> None:
    """The trained tensors are others than at the start."""
    still = [
        tuple(weight.shape)
        for weight, start in zip(side.learning, side.start, strict=True)
        if torch.equal(weight.detach(), start)
    ]
    if still:
        raise BenchError(
            f"{side.name}: {len(still)} of {len(side.learning)} trained tensors have not moved, "
            f"such as one of shape {still[0]}"
        )


def _is_alive(gradient: Tensor) -> bool:
    return bool(torch.isfinite(gradient).all() and gradient.any())
