"""What it costs to save a checkpoint every 100 steps: the embedded base, with and without, in turn.

python -m tests.torture.save_cost
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from lora_sd import checkpoint
from lora_sd import train as trainer
from lora_sd.config import config_from_values
from lora_sd.run_folder import RunFolder
from tests.conftest import PROJECT

MOST = 0.02  # of the run's time
NEVER = 1_000_000


def timed(folder: Path, name: str, steps: int, save_every: int) -> tuple[float, float]:
    """Train the demo without its pictures; (seconds from the first step's end to the last one's,
    seconds of those in saves)."""
    settings: dict[str, Any] = yaml.safe_load((PROJECT / "configs" / "tiny.yaml").read_text())
    settings.pop("sample")
    # One step more, which is saved in any case, after the last that is timed.
    settings["train"]["steps"] = steps + 1
    settings["output"] = {"folder": str(folder), "name": name, "save_every_steps": save_every}
    settings["data"] |= {"folder": str(PROJECT / settings["data"]["folder"])}
    save, append = checkpoint.save, RunFolder.append_metrics
    marks: list[float] = []
    saves: list[float] = []

    def timed_save(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        found = save(*arguments, **options)
        saves.append(time.perf_counter() - started)
        return found

    def timed_append(self: Any, values: dict[str, Any]) -> None:
        append(self, values)
        marks.append(time.perf_counter())

    checkpoint.save = timed_save
    RunFolder.append_metrics = timed_append  # type: ignore[method-assign]
    try:
        trainer.train(config_from_values(settings), name)
    finally:
        checkpoint.save = save
        RunFolder.append_metrics = append  # type: ignore[method-assign]
    return marks[-1] - marks[0], sum(saves[:-1])


def main() -> int:
    """The measurement as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=100)
    chosen = parser.parse_args()
    shares, ratios = [], []
    with tempfile.TemporaryDirectory() as folder:
        timed(Path(folder), "warm-up", 2, NEVER)
        for number in range(chosen.pairs):
            took = {}
            order = [chosen.every, NEVER] if number % 2 else [NEVER, chosen.every]
            for every in order:
                took[every] = timed(Path(folder), f"{number}-{every}", chosen.steps, every)
            seconds, in_saves = took[chosen.every]
            shares.append(in_saves / (seconds - in_saves))
            ratios.append(seconds / took[NEVER][0] - 1)
            print(
                f"{chosen.steps} steps: {seconds:.2f} s with saves (of that {in_saves:.3f} s in "
                f"them), {took[NEVER][0]:.2f} s without",
                flush=True,
            )
    share, ratio = statistics.median(shares), statistics.median(ratios)
    print(
        f"saving every {chosen.every} steps: {share:.2%} of the time of the steps is spent in it;"
    )
    print(
        f"whole runs took {ratio:+.2%} (the others' noise is in that); at most {MOST:.0%} is asked"
    )
    return share > MOST


if __name__ == "__main__":
    sys.exit(main())
