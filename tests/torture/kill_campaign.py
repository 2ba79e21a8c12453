"""Kill the trainer hundreds of times, wherever it is, and see that nothing is ever lost.

    python -m tests.torture.kill_campaign --kills 200 --seed 7

Half of the kills are aimed into the saving and pruning of checkpoints, the others fall anywhere.
After each, the newest whole checkpoint may not be older than before the kill, nor further back than
one save interval from the last step that was done; the run must go on; and when it ends, adapter,
optimizer, losses and exported file must be those of a run that was never interrupted, to the bit,
with nothing left over in its folder.
"""

import argparse
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_sd import checkpoint
from lora_sd import train as trainer
from tests.torture.broken_savers import BROKEN
from tests.torture.tiny_run import (
    SAVE_EVERY,
    VARIANTS,
    digests,
    ended,
    files_of,
    last_step_told,
    newest_whole_step,
    run_of,
    settings_in,
    tail,
    train_forked,
    trained,
)

PHASES = ("elsewhere", "saving", "pruning", "result")
LEAST_HITS = 0.3  # of all kills, that must fall into a save
LAYOUT = struct.Struct("=BIdd")
GIVEN_UP_S = 120


class Place:
    """Where a forked trainer is, in memory that it shares with its killer."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, LAYOUT.size)
        self.clear()

    def clear(self) -> None:
        self._write(0, 0, 0.0, 0.0)

    @property
    def phase(self) -> int:
        return self._read()[0]

    @property
    def saves(self) -> int:
        """How many saves have begun."""
        return self._read()[1]

    @property
    def save_s(self) -> float:
        """How long the last save took."""
        return self._read()[3]

    def watch(self) -> None:
        """In the trainer's process: keep the memory up to date."""
        save, remove, save_result = (
            checkpoint.save, checkpoint.durable.remove_folder, trainer.save_result,
        )  # fmt: skip

        def watched_save(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            self._write(1, self.saves + 1, started, self.save_s)
            found = save(*arguments, **options)
            self._write(0, self.saves, 0.0, time.monotonic() - started)
            return found

        def watched_remove(folder: Path) -> None:
            before = self._read()
            is_old = before[0] == 1 and folder.name.startswith("step_")
            if not is_old:
                return remove(folder)
            # Slowed down: it is over sooner than its killer gets to work.
            self._write(2, *before[1:])
            unlink = os.unlink
            os.unlink = lambda *arguments, **options: (
                time.sleep(0.002), unlink(*arguments, **options)
            )[1]  # fmt: skip
            try:
                remove(folder)
            finally:
                os.unlink = unlink
                self._write(*before)

        def watched_result(*arguments: Any, **options: Any) -> Any:
            self._write(3, *self._read()[1:])
            found = save_result(*arguments, **options)
            self._write(0, *self._read()[1:])
            return found

        checkpoint.save = watched_save
        checkpoint.durable.remove_folder = watched_remove
        trainer.save_result = watched_result

    def _read(self) -> tuple[int, int, float, float]:
        return LAYOUT.unpack(self._memory[:])

    def _write(self, phase: int, saves: int, began: float, took: float) -> None:
        self._memory[:] = LAYOUT.pack(phase, saves, began, took)


@dataclass
class Figures:
    """What a campaign found.

    Attributes:
        hits: kills by the phase they fell into.
        failed_resumes: runs that did not go on after a kill.
        problems: everything that was not as it must be, in sentences.
        most_lost: steps that a kill cost at most.
    """

    kills: int = 0
    finished: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    failed_resumes: int = 0
    problems: list[str] = field(default_factory=list)
    most_lost: int = 0
    seconds: float = 0.0

    @property
    def share_in_saves(self) -> float:
        """Of the kills, those that fell into saving or pruning."""
        return (self.hits["saving"] + self.hits["pruning"]) / max(self.kills, 1)

    def told(self) -> str:
        """The figures as lines."""
        hits = ", ".join(f"{self.hits[phase]} {phase}" for phase in PHASES)
        return "\n".join(
            [
                f"{self.kills} kills: {hits} ({self.share_in_saves:.0%} in saves)",
                f"{self.finished} runs finished, {self.failed_resumes} failed resumes, "
                f"{len(self.problems)} problems in all",
                f"most steps lost by a kill: {self.most_lost}, of {SAVE_EVERY} between saves",
                f"{self.seconds / max(self.kills, 1):.2f} s a kill; with no failure the rate of "
                f"failures is below {3 / max(self.kills, 1):.2%} (95 %)",
                *self.problems[:20],
            ]
        )


def campaign(
    folder: Path,
    kills: int,
    seed: int,
    variants: tuple[str, ...] = tuple(VARIANTS),
    break_it: Callable[[], object] | None = None,
    tell: Callable[[str], object] = lambda line: None,
) -> Figures:
    """Kill trainers in a folder until there were so many kills and the last run has finished.

    Args:
        break_it: is called in each trainer's process first, to see that the campaign notices.
        tell: gets a line now and then.
    """
    draw, found, place = random.Random(seed), Figures(), Place()
    references: dict[str, tuple[dict[str, str], set[str], float]] = {}
    for variant in variants:
        settings = settings_in(folder, variant)
        settings["output"]["folder"] = str(folder / f"straight-{variant}" / "outputs")
        log = folder / f"straight-{variant}.log"
        trained(settings, log)  # fills the cache, as a run that goes on finds it
        shutil.rmtree(run_of(settings).path)
        took = trained(settings, log)
        references[variant] = digests(run_of(settings)), files_of(run_of(settings)), took
        tell(f"{variant}: a run takes {took:.1f} s")
    started = time.monotonic()
    number = told = 0
    while found.kills < kills:
        variant = variants[number % len(variants)]
        settings = settings_in(folder, variant)
        settings["output"]["folder"] = str(folder / f"killed-{number}" / "outputs")
        _kill_one_run(settings, variant, references[variant], draw, place, found, break_it, kills)
        number += 1
        shutil.rmtree(folder / f"killed-{number - 1}", ignore_errors=True)
        tell(f"{found.kills} kills, {found.finished} finished, {len(found.problems)} problems")
        for problem in found.problems[told:]:
            tell(problem)
        told = len(found.problems)
    found.seconds = time.monotonic() - started
    if found.share_in_saves < LEAST_HITS:
        found.problems.append(f"only {found.share_in_saves:.0%} of the kills fell into a save")
    return found


def _kill_one_run(
    settings: dict[str, Any],
    variant: str,
    reference: tuple[dict[str, str], set[str], float],
    draw: random.Random,
    place: Place,
    found: Figures,
    break_it: Callable[[], object] | None,
    kills: int,
) -> None:
    """Start a run again and again, and kill it, until it is finished."""
    expected, files, took = reference
    run = run_of(settings)
    log = run.path.parent.parent / "trainer.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    name = f"{variant}, after kill {found.kills}"
    newest = 0

    def before() -> None:
        if break_it is not None:
            break_it()
        place.watch()

    while True:
        place_s = place.save_s
        place.clear()
        pid = train_forked(settings, log, before)
        if found.kills < kills:
            _wait_for_the_moment(pid, draw, place, took, place_s or 0.05)
        else:
            status = ended(pid)
            return _judge_end(status, run, name, log, expected, files, found)
        finished, waited = os.waitpid(pid, os.WNOHANG)
        if finished:
            status = os.waitstatus_to_exitcode(waited)
            return _judge_end(status, run, name, log, expected, files, found)
        os.kill(pid, signal.SIGKILL)
        if ended(pid) != -signal.SIGKILL:
            continue  # it ended in that moment; the next start finds it finished
        found.kills += 1
        found.hits[PHASES[place.phase]] += 1
        name = f"{variant}, after kill {found.kills} ({PHASES[place.phase]})"
        whole, told = newest_whole_step(run), last_step_told(run)
        if whole < newest:
            found.problems.append(
                f"{name}: the newest whole checkpoint went from {newest} to {whole}"
            )
        newest = max(whole, newest)
        found.most_lost = max(found.most_lost, told - whole)
        if told - whole > SAVE_EVERY:
            found.problems.append(f"{name}: at step {told} only step {whole} is whole")


def _wait_for_the_moment(
    pid: int, draw: random.Random, place: Place, took: float, save_s: float
) -> None:
    """Wait for the moment of the kill, or for the end of the trainer."""
    deadline = time.monotonic() + GIVEN_UP_S
    # Pruning is over in a moment, so that some kills wait for it without a pause.
    aim = draw.choice(["anywhere", "anywhere", "anywhere", "saving", "saving", "pruning"])
    chosen, share = draw.randint(1, 5), draw.random()
    until = time.monotonic() + share * took
    while time.monotonic() < deadline:
        phase, saves = place.phase, place.saves
        if aim == "saving" and saves >= chosen and phase in (1, 2):
            time.sleep(share * save_s)
            return
        if aim == "pruning" and saves >= chosen and phase == 2:
            return
        if aim == "anywhere" and time.monotonic() >= until:
            return
        if aim == "pruning" and phase == 1:
            continue
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0002)


def _judge_end(
    status: int,
    run: Any,
    name: str,
    log: Path,
    expected: dict[str, str],
    files: set[str],
    found: Figures,
) -> None:
    """Compare a run that has ended with one that was never interrupted."""
    if status:
        found.failed_resumes += 1
        found.problems.append(f"{name}: it did not go on, but ended with {status}: {tail(log)}")
        return
    found.finished += 1
    for what, digest in digests(run).items():
        if digest != expected.get(what):
            found.problems.append(f"{name}: {what} differ from those of an uninterrupted run")
    if files_of(run) != files:
        found.problems.append(
            f"{name}: left over {sorted(files_of(run) - files)}, missing "
            f"{sorted(files - files_of(run))}"
        )


def main() -> int:
    """The campaign as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--broken", choices=list(BROKEN), help="with a saver that is not ours")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        found = campaign(
            Path(folder),
            chosen.kills,
            chosen.seed,
            tuple(chosen.variants),
            BROKEN.get(chosen.broken),
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    print(found.told())
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
