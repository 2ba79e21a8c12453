"""Kill trainers that were really launched: by accelerate, by torchrun, or by hand.

    python -m tests.torture.real_kills --kills 20 --seed 7

The trainer is killed, or its launcher, or both at once. After each kill no trainer may be left
after a while, and the run must go on; at its end it must be that of an uninterrupted run.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from lora_sd.errors import EXIT_RESUMABLE
from lora_sd.run_folder import RunFolder
from tests.conftest import PROJECT
from tests.torture.tiny_run import (
    SAVE_EVERY,
    arguments,
    digests,
    files_of,
    last_step_told,
    newest_whole_step,
    run_of,
    settings_in,
)

STEPS = 60
PATIENCE_S = 120
GONE_S = 20  # a trainer whose launcher is dead saves and ends within
LAUNCHERS = {
    "accelerate": [
        "-m", "accelerate.commands.launch", "--quiet", "--num_processes", "1", "--num_machines",
        "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu",
    ],
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone"],
    "by hand": [],
}  # fmt: skip
TARGETS = ("trainer", "launcher", "both")


def start(launcher: str, settings: dict[str, Any], log: Path) -> subprocess.Popen[bytes]:
    """Launch the trainer in a session of its own."""
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, *LAUNCHERS[launcher], "train_sd_lora.py", *arguments(settings)],
            cwd=PROJECT,
            env={**os.environ, "ACCELERATE_USE_CPU": "true"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def trainer_of(run: RunFolder) -> psutil.Process | None:
    """The process that trains, as the run says."""
    status = run.read_status()
    if status is None or not status.is_alive():
        return None
    try:
        return psutil.Process(status.pid)
    except psutil.Error:
        return None


def main() -> int:
    """The campaign as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--launchers", nargs="*", default=list(LAUNCHERS), choices=list(LAUNCHERS))
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}", flush=True)
    draw, problems, kills, finished = random.Random(chosen.seed), [], Counter[str](), 0
    most_lost, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        straight = settings_in(folder, train={"steps": STEPS})
        straight["output"]["folder"] = str(folder / "straight" / "outputs")
        process = start("by hand", straight, folder / "straight.log")
        if process.wait():
            print((folder / "straight.log").read_text()[-2000:])
            return 1
        expected, files = digests(run_of(straight)), files_of(run_of(straight))
        number = 0
        while kills.total() < chosen.kills:
            launcher = chosen.launchers[number % len(chosen.launchers)]
            number += 1
            settings = settings_in(folder, train={"steps": STEPS})
            settings["output"]["folder"] = str(folder / f"run-{number}" / "outputs")
            run, log = run_of(settings), folder / f"run-{number}.log"
            while True:
                before = last_step_told(run)
                process = start(launcher, settings, log)
                is_last = kills.total() >= chosen.kills
                until = STEPS + 1 if is_last else newest_whole_step(run) + draw.randint(1, 12)
                deadline = time.monotonic() + PATIENCE_S
                while process.poll() is None and time.monotonic() < deadline:
                    # What was told before the start is cut off when the run goes on.
                    trainer = trainer_of(run)
                    if trainer is not None and last_step_told(run) >= until != before:
                        break
                    time.sleep(0.005)
                if process.poll() is not None:
                    break
                target = draw.choice(TARGETS) if launcher != "by hand" else "trainer"
                trainer = trainer_of(run)
                victims = {"trainer": [trainer], "launcher": [process], "both": [trainer, process]}
                for victim in victims[target]:
                    if victim is not None:
                        os.kill(victim.pid, signal.SIGKILL)
                kills[f"{launcher}: {target}"] += 1
                process.wait(PATIENCE_S)
                if trainer is not None:
                    try:
                        trainer.wait(GONE_S)
                    except psutil.TimeoutExpired:
                        problems.append(
                            f"{launcher}: the trainer lives {GONE_S} s after its launcher"
                        )
                        trainer.kill()
                        trainer.wait()
                whole, told = newest_whole_step(run), last_step_told(run)
                most_lost = max(most_lost, told - whole)
                if told - whole > SAVE_EVERY:
                    problems.append(f"{launcher}: at step {told} only step {whole} is whole")
                if target == "launcher" and trainer is not None:
                    status = run.read_status()
                    if status is None or status.state not in ("stopped", "finished"):
                        problems.append(f"{launcher} died, and the trainer is {status}")
            if process.returncode not in (0, EXIT_RESUMABLE):
                problems.append(
                    f"{launcher}: it did not go on, but ended with {process.returncode}: "
                    f"{log.read_text(errors='replace')[-1500:]}"
                )
                continue
            finished += 1
            if digests(run) != expected:
                problems.append(f"{launcher}: the finished run is not the uninterrupted one")
            if files_of(run) != files:
                problems.append(f"{launcher}: left over {sorted(files_of(run) ^ files)}")
            print(
                f"{kills.total()} kills, {finished} finished, {len(problems)} problems", flush=True
            )
    seconds = time.monotonic() - started
    print(f"{kills.total()} kills: {', '.join(f'{n} {what}' for what, n in sorted(kills.items()))}")
    print(f"{finished} runs finished; most steps lost {most_lost}; {len(problems)} problems")
    print(f"{seconds / max(kills.total(), 1):.1f} s a kill")
    print(*problems[:20], sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
