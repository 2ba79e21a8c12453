"""The plan of a run before it starts, made in a process of its own: that can be ended at any
moment, and the page never waits for it."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_sd.config import Config
from lora_sd.errors import UserError
from lora_sd.ui.launch import PROJECT
from lora_sd.ui.texts import say

COMMAND = (sys.executable, "-m", "lora_sd", "plan")
KEPT = 50
LOOK_EVERY_S = 0.1


@dataclass(frozen=True)
class RunPlan:
    """What `python -m lora_sd plan` says, as far as the page shows it; bytes and seconds.

    Attributes:
        pictures, epochs: None where the pictures cannot be read.
        time_s: of all steps; None where no step was measured.
        phases: (part of the run, memory at its highest).
        cards: (GB, whether it fits, what is changed for that, memory then).
    """

    device: str
    steps: int
    pictures: int | None
    pictures_seen: int
    epochs: float | None
    time_s: float | None
    memory: int
    phases: tuple[tuple[str, int], ...]
    adapter: int
    checkpoint: int
    layers: int
    parameters: int
    cards: tuple[tuple[float, bool, tuple[str, ...], int], ...]
    notices: tuple[str, ...]


class PlanCancelled(Exception):
    """The plan was not wanted any more."""


class Planner:
    """Makes plans, and keeps the last ones by their settings.

    Args:
        command: of the verb, to which its arguments are added.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = list(command)
        self._kept: OrderedDict[str, RunPlan] = OrderedDict()
        self._lock = threading.Lock()

    def plan(self, config: Config, measured: bool, on_wait: Callable[[float], bool]) -> RunPlan:
        """What a run of these settings needs.

        Args:
            measured: do a few real steps where that can be; else all is said from shapes.
            on_wait: called every moment with the seconds since the start; True ends it.

        Raises:
            PlanCancelled: `on_wait` asked for it.
            UserError: the settings cannot be used.
        """
        key = _key(config, measured)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = _parsed(self._run(config, measured, on_wait))
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return made

    def _run(
        self, config: Config, measured: bool, on_wait: Callable[[float], bool]
    ) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory() as place:
            file, said, wrong = (Path(place, name) for name in ("config.yaml", "plan", "errors"))
            file.write_text(config.to_yaml(), encoding="utf-8")
            shapes = [] if measured else ["--shapes"]
            with open(said, "wb") as out, open(wrong, "wb") as err:
                process = subprocess.Popen(
                    [*self._command, "--config", str(file), "--json", *shapes],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    env={**os.environ, "PYTHONPATH": str(PROJECT)},
                )
                try:
                    began = time.monotonic()
                    while process.poll() is None:
                        if on_wait(time.monotonic() - began):
                            raise PlanCancelled
                        time.sleep(LOOK_EVERY_S)
                finally:
                    process.kill()
                    process.wait()
            if process.returncode:
                lines = wrong.read_text(encoding="utf-8", errors="replace").splitlines()
                problems = [line[7:] for line in lines if line.startswith("error: ")]
                raise UserError(problems or [say("train.plan.failed")])
            values: Mapping[str, Any] = json.loads(said.read_text(encoding="utf-8"))
            return values


def _key(config: Config, measured: bool) -> str:
    """What a plan depends on: the settings but for the run's name, and the folders' state."""
    values = config.model_dump()
    values["output"]["name"] = None
    folders = [one["folder"] for one in config.data.folder_options()]
    states = [folder.stat().st_mtime_ns if folder.is_dir() else 0 for folder in folders]
    text = json.dumps([values, states, measured], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _parsed(values: Mapping[str, Any]) -> RunPlan:
    return RunPlan(
        device=values["device"],
        steps=values["steps"],
        pictures=values["pictures"],
        pictures_seen=values["pictures_seen"],
        epochs=values["epochs"],
        time_s=values["time_s"],
        memory=values["highest"],
        phases=tuple((phase["name"], phase["total"]) for phase in values["phases"]),
        adapter=values["adapter_bytes"],
        checkpoint=values["checkpoint_bytes"],
        layers=values["layers"],
        parameters=values["parameters"],
        cards=tuple(
            (card["gb"], card["fits"], tuple(card["changes"]), card["highest"])
            for card in values["cards"]
        ),
        notices=tuple(values["notices"]),
    )
