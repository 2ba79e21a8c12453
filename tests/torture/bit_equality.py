"""Runs that are stopped or killed and go on, against the same runs without interruption: equal to
the bit, over a grid of settings in which every pair of choices occurs.

    python -m tests.torture.bit_equality
    python -m tests.torture.bit_equality --without-seeds    to see that it notices

Compared with ==: the exported file, weights, the optimizer's state, losses, learning rates, and all
that was seen: pictures, captions, timesteps, noise. There are no workers to vary: pictures are read
from the cache by the process that trains.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_sd import train_step
from lora_sd.data.training_data import TrainingData
from lora_sd.errors import EXIT_RESUMABLE
from lora_sd.run_folder import RunFolder
from tests.torture.tiny_run import (
    digest_of,
    digests,
    ended,
    run_of,
    settings_in,
    tail,
    train_forked,
)

Stop = tuple[str, int]
"""('after', a step that is done) or ('within', the step before whose last pass a request comes)."""

STOPS: dict[str, list[Stop]] = {  # an epoch has 11 steps and a picture more now and then
    "after the first step": [("after", 1)],
    "within an epoch": [("after", 6)],
    "after an epoch's last step": [("after", 11)],
    "after an epoch's first step": [("after", 12)],
    "after the last step but one": [("after", 23)],
    "after the last step": [("after", 24)],
    "within a step": [("within", 7)],
    "twice": [("after", 4), ("within", 13)],
    "five times": [("after", step) for step in (2, 3, 9, 15, 20)],
}
CHOICES: dict[str, Sequence[Any]] = {
    "stop": list(STOPS),
    "by": ["a request", "kill -9"],
    "passes": [1, 3],
    "schedule": [
        "constant", "linear", "cosine", "cosine_with_restarts", "polynomial",
        "warmup_stable_decay", "rex",
    ],
    "cache": ["disk", "memory"],
    "text_encoder": [False, True],
    "dropout": [0.0, 0.1],
    "average": [0.0, 0.9],
    "optimizer": ["adamw", "lion", "adafactor"],
}  # fmt: skip
Case = dict[str, Any]


def pairwise(choices: dict[str, Sequence[Any]], seed: int = 0) -> list[Case]:
    """Few cases in which any two values of different choices occur together somewhere."""
    draw = random.Random(seed)
    names = list(choices)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in choices[a]
        for y in choices[b]
    }
    cases = []
    while missing:
        best: tuple[int, Case] = (0, {})
        for _ in range(60):
            a, x, b, y = draw.choice(sorted(missing, key=repr))
            case = {name: draw.choice(choices[name]) for name in names} | {a: x, b: y}
            gain = len(_pairs(case, names) & missing)
            best = max(best, (gain, case), key=lambda one: one[0])
        missing -= _pairs(best[1], names)
        cases.append(best[1])
    return cases


def _pairs(case: Case, names: Sequence[str]) -> set[tuple[str, Any, str, Any]]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}


def settings_of(folder: Path, case: Case) -> dict[str, Any]:
    """The settings of a case."""
    return settings_in(
        folder,
        data={
            **settings_in(folder)["data"], "cache": case["cache"], "shuffle_tags": True,
            "caption_dropout": 0.2,
        },
        adapter={"text_encoder": case["text_encoder"], "dropout": case["dropout"]},
        train={
            "batch_size": 3 // case["passes"],
            "gradient_accumulation": case["passes"],
            "ema_decay": case["average"],
        },
        optimizer={"schedule": case["schedule"], "name": case["optimizer"], "schedule_cycles": 2},
    )  # fmt: skip


def watch(seen: Path, stop: Stop | None, number: int) -> None:
    """In the trainer's process: write down what steps see, and interrupt it once.

    Args:
        number: of the signal.
    """
    batches, append, errors_of = (
        TrainingData.batches,
        RunFolder.append_metrics,
        train_step.errors_of,
    )
    now = {"step": 0, "passes": 0}

    def noting(self: Any, step: int, *arguments: Any) -> Any:
        found = batches(self, step, *arguments)
        now["step"], now["passes"] = step + 1, len(found)
        with open(seen, "a", encoding="utf-8") as file:
            facts = [[b.names, b.captions, b.timesteps.tolist()] for b in found]
            tensors = [[b.latents, b.noise, b.time_ids, b.weights] for b in found]
            file.write(json.dumps([step, facts, digest_of(tensors)]) + "\n")
        return found

    def append_and_stop(self: Any, values: dict[str, Any]) -> None:
        append(self, values)
        if stop == ("after", values["step"]):
            os.kill(os.getpid(), number)

    def stop_and_compute(*arguments: Any) -> Any:
        now["passes"] -= 1
        if stop == ("within", now["step"]) and now["passes"] == 0:
            os.kill(os.getpid(), number)
        return errors_of(*arguments)

    TrainingData.batches = noting  # type: ignore[method-assign]
    RunFolder.append_metrics = append_and_stop  # type: ignore[method-assign]
    train_step.errors_of = stop_and_compute


def without_seeds() -> None:
    """In the trainer's process: dropout draws on, instead of being seeded for each pass."""
    train_step.torch.manual_seed = lambda seed: None  # type: ignore[assignment]


def trained_with(
    settings: dict[str, Any], stops: Sequence[Stop], by: str, seeds: bool, log: Path
) -> tuple[dict[int, Any], str]:
    """Train with interruptions; (what each step saw, what went wrong or '')."""
    seen = log.with_suffix(".seen")
    number = signal.SIGKILL if by == "kill -9" else signal.SIGTERM
    for stop in [*stops, None]:

        def before(stop: Stop | None = stop) -> None:
            if not seeds:
                without_seeds()
            watch(seen, stop, number)

        status = ended(train_forked(settings, log, before))
        # One that is asked to stop after its last step has nothing left to do.
        expected = (0,) if stop is None else (EXIT_RESUMABLE, -signal.SIGKILL, 0)
        if status not in expected:
            return {}, f"it ended with {status}: {tail(log)}"
    steps: dict[int, Any] = {}
    for line in seen.read_text().splitlines():
        step, *facts = json.loads(line)
        if steps.setdefault(step, facts) != facts:
            return {}, f"step {step + 1} saw something else the second time"
    return steps, ""


def judge(folder: Path, case: Case, seeds: bool = True) -> list[str]:
    """What is not equal in a case."""
    shutil.rmtree(folder / "straight", ignore_errors=True)
    shutil.rmtree(folder / "stopped", ignore_errors=True)
    found = {}
    for kind, stops in (("straight", []), ("stopped", STOPS[case["stop"]])):
        settings = settings_of(folder, case)
        settings["output"]["folder"] = str(folder / kind / "outputs")
        (folder / kind).mkdir()
        log = folder / kind / "log"
        steps, problem = trained_with(settings, stops, case["by"], seeds, log)
        if problem:
            return [f"{kind}: {problem}"]
        found[kind] = {**digests(run_of(settings)), "what was seen": digest_of(steps)}
    return [name for name, digest in found["straight"].items() if found["stopped"][name] != digest]


def main() -> int:
    """The grid as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases")
    parser.add_argument("--most", type=int, default=10_000, help="cases")
    parser.add_argument("--without-seeds", action="store_true")
    chosen = parser.parse_args()
    cases = pairwise(CHOICES, chosen.seed)[: chosen.most]
    started, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(cases, start=1):
            problems = judge(Path(folder), case, not chosen.without_seeds)
            bad += bool(problems)
            told = f"differs: {', '.join(problems)}" if problems else "equal"
            print(
                f"{number}/{len(cases)} {' | '.join(map(str, case.values()))}: {told}", flush=True
            )
    print(f"{len(cases) - bad} of {len(cases)} cases equal, {time.monotonic() - started:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
