"""A trainer that only counts, for the tests of the app: same command, same run folder."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_sd.config import Config, config_from_values
from lora_sd.ui.launch import PROJECT, Trainer
from lora_sd.ui.train.run_view import read_run

# As `accelerate launch` does: starts the trainer, waits, and leaves it behind when killed.
FAKE_LAUNCHER = """
import subprocess, sys
code = subprocess.Popen(sys.argv[1:]).wait()
print(f"\\nThe trainer ended: {code}", flush=True)
sys.exit(abs(code))
"""
FAKE_TRAINER = f"""
import os, signal, sys, time
sys.path.insert(0, {str(PROJECT)!r})
from pathlib import Path
from lora_sd.config import config_from_values, read_yaml
from lora_sd.run_folder import RunFolder, Status, create_run
flag, path = sys.argv[1:]
resumed = flag == "--resume"
config = config_from_values(read_yaml(Path(path) / "config.yaml" if resumed else Path(path)))
if config.adapter.rank > 100:
    print("error: 'adapter.rank' is too large for this model.", file=sys.stderr)
    sys.exit(2)
if config.adapter.rank == 77:
    sys.exit("something nobody foresaw")
root = Path(config.output.folder)
run = RunFolder(path) if resumed else create_run(root, config.output.name, "run", config.to_yaml())
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1) if config.train.seed != 13 else None)
status = run.read_status() if resumed else Status("starting", 0, config.train.steps)
status.state = "training"
def asked(request):
    there = run.request_file(request).exists()
    if there and request != "pause":
        run.withdraw(request)
    return there
while status.step < config.train.steps and not stop:
    if asked("save"):
        run.checkpoint(status.step).mkdir()
    if asked("sample"):
        run.sample_file(status.step, 0).touch()
    if asked("stop"):
        stop.append(1)
    status.state = "paused" if asked("pause") else "training"
    if status.state == "paused":
        run.write_status(status)
        time.sleep(0.02)
        continue
    time.sleep(0.05)
    status.step += 1
    run.append_metrics({{"step": status.step, "loss": 1 / status.step, "lr": 1e-3, "grad_norm": 1.0,
                        "images_per_s": 8.0, "seconds": 0.05 * status.step}})
    run.write_status(status)
status.state = "stopped" if stop else "finished"
run.write_status(status)
sys.exit(75 if stop else 0)
"""


@pytest.fixture(name="trainer")
def fake_trainer(tmp_path: Path) -> Iterator[Trainer]:
    script = tmp_path / "fake_trainer.py"
    script.write_text(FAKE_TRAINER)
    command = [sys.executable, "-c", FAKE_LAUNCHER, sys.executable, str(script)]
    trainer = Trainer(tmp_path / "outputs", command)
    yield trainer
    for process in trainers_of(trainer):
        process.kill()


def config(outputs: Path, name: str = "run", **train: Any) -> Config:
    rank = train.pop("rank", 8)
    return config_from_values(
        {
            "train": {"steps": 4000, **train},
            "adapter": {"rank": rank},
            "output": {"folder": str(outputs), "name": name},
        }
    )


def wait_for(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def state(trainer: Trainer, name: str = "run") -> str:
    return read_run(trainer, name).badge


def trainers_of(trainer: Trainer) -> list[psutil.Process]:
    """Living processes that work in this test's folder, and zombies among our children."""
    mine = [c for c in psutil.Process().children(recursive=True) if c.pid != os.getpid()]
    return [
        p
        for p in mine
        if p.status() == psutil.STATUS_ZOMBIE or str(trainer.outputs.parent) in str(p.cmdline())
    ]
