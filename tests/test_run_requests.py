"""A pause, a save or samples asked for on the way leave the run the same, to the bit."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from test_full_disk import losses, saved, straight
from test_resume import go_on
from test_stop_request import wait_for

from lora_sd import run_requests, stop_request
from lora_sd import train as trainer
from lora_sd.config import config_from_values
from lora_sd.errors import EXIT_RESUMABLE
from lora_sd.run_folder import REQUESTS, Request, RunFolder, Status

Settings = dict[str, dict]
Seen = list[tuple[str, int]]


@pytest.fixture
def run(run_settings: Settings) -> RunFolder:
    """The run of the settings, once it is there; with dropout and averaged weights, which a
    careless pause would change."""
    run_settings["adapter"] |= {"dropout": 0.3}
    run_settings["train"] |= {"ema_decay": 0.9}
    run_settings["sample"] = {
        "prompts": ["a red wall"],
        "steps": 1,
        "every_steps": 100,
        "scales": [],
    }
    run_settings["output"] |= {"save_every_steps": 100, "keep_checkpoints": 9, "name": "asked"}
    return RunFolder(Path(run_settings["output"]["folder"]) / "asked")


@pytest.fixture
def whole(run_settings: Settings, run: RunFolder) -> RunFolder:
    """The same run, of which nothing was asked."""
    folder = run_settings["output"]["folder"]
    done = straight(run_settings)
    run_settings["output"]["folder"] = folder
    return RunFolder(done.path.rename(done.path.with_name("whole")))


@pytest.fixture
def ask_at(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Request]]:
    """What the run is asked for when a step is done."""
    asked: dict[int, list[Request]] = {}
    append = RunFolder.append_metrics

    def append_and_ask(self: RunFolder, values: dict) -> None:
        append(self, values)
        for request in asked.pop(values["step"], []):
            self.ask(request)

    for module in (run_requests, stop_request):
        monkeypatch.setattr(module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(RunFolder, "append_metrics", append_and_ask)
    return asked


@pytest.fixture
def in_pauses(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> list[list[Request]]:
    """What the run is asked for each time it looks whether its pause is over; then it is over."""
    asked: list[list[Request]] = []

    def ask_or_go_on(_: float) -> None:
        for request in asked.pop(0) if asked else []:
            run.ask(request)
        if not asked:
            run.withdraw("pause")

    monkeypatch.setattr(run_requests.time, "sleep", ask_or_go_on)
    return asked


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """(state, step) of every change of state."""
    changes: Seen = []
    write = RunFolder.write_status

    def noting(self: RunFolder, status: Status) -> None:
        write(self, status)
        if changes[-1:] != [(status.state, status.step)]:
            changes.append((status.state, status.step))

    monkeypatch.setattr(RunFolder, "write_status", noting)
    return changes


def train(settings: Settings) -> int:
    return trainer.train(config_from_values(settings), "run")


def assert_same(run: RunFolder, whole: RunFolder) -> None:
    assert losses(run) == losses(whole) and saved(run, 6) == saved(whole, 6)
    assert run.adapter_file.read_bytes() == whole.adapter_file.read_bytes()
    assert [one for one in REQUESTS if run.request_file(one).exists()] == []


def test_saved_and_sampled_on_the_way_it_is_the_same(
    run_settings: Settings, run: RunFolder, whole: RunFolder, ask_at, seen: Seen
) -> None:
    ask_at |= {1: ["sample"], 3: ["save"], 4: ["save", "sample"]}
    assert train(run_settings) == 0
    assert [run.checkpoint(step).is_dir() for step in (1, 3, 4)] == [False, True, True]
    assert [run.sample_file(step, 0).is_file() for step in (1, 3, 4)] == [True, False, True]
    assert {step for state, step in seen if state == "sampling"} == {0, 1, 4, 6}
    assert_same(run, whole)


def test_paused_it_waits_and_is_the_same(
    run_settings: Settings, run: RunFolder, whole: RunFolder, ask_at, in_pauses, seen: Seen
) -> None:
    """What is asked for during a pause is done during it."""
    ask_at |= {2: ["pause"], 5: ["pause", "sample"]}
    in_pauses += [[], ["save"], ["sample"], []]
    assert train(run_settings) == 0
    at_2 = [state for state, step in seen if step == 2 and state != "training"]
    assert at_2 == ["paused", "saving", "paused", "sampling", "paused"]
    assert ("paused", 5) in seen and run.sample_file(5, 0).is_file()
    assert_same(run, whole)


def test_a_pause_ends_by_a_stop_and_the_run_goes_on_as_the_same(
    run_settings: Settings, run: RunFolder, whole: RunFolder, ask_at, in_pauses, seen: Seen
) -> None:
    """What was left of the requests is from before then, and not meant."""
    ask_at |= {3: ["pause"]}
    in_pauses += [[], ["stop"], []]
    assert train(run_settings) == EXIT_RESUMABLE
    assert ("paused", 3) in seen and seen[-1] == ("stopped", 3) and run.checkpoint(3).is_dir()
    assert run.request_file("pause").exists()
    os.utime(run.request_file("pause"), (time.time() - 60, time.time() - 60))
    run.ask("save")
    os.utime(run.request_file("save"), (time.time() - 60, time.time() - 60))
    assert go_on(run) == 0  # and is not paused by what was asked for before
    assert "pause' was left from before" in run.log_file.read_text()
    assert not run.checkpoint(4).exists()
    assert_same(run, whole)


def test_samples_without_prompts_are_named_and_the_run_goes_on(
    run_settings: Settings, run: RunFolder, ask_at
) -> None:
    run_settings["sample"] = {}
    ask_at |= {1: ["sample"]}
    assert train(run_settings) == 0
    assert "no samples can be drawn: sample.prompts" in run.log_file.read_text()


@pytest.mark.slow
def test_two_processes_pause_save_and_sample_at_the_same_step(
    run_settings: Settings, tmp_path: Path
) -> None:
    run_settings["train"]["steps"] = 60
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 1, "every_steps": 100}

    def launched(name: str) -> tuple[subprocess.Popen, RunFolder]:
        file = tmp_path / f"{name}.yaml"
        run_settings["output"]["name"] = name
        file.write_text(yaml.safe_dump(run_settings))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--standalone", "train_sd_lora.py", "--config", str(file)]
        env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        return subprocess.Popen(command, cwd=PROJECT, env=env), RunFolder(
            tmp_path / "outputs" / name
        )

    trainer, whole = launched("whole")
    assert trainer.wait() == 0
    trainer, run = launched("asked")
    while not run.read_metrics():
        assert trainer.poll() is None
        time.sleep(0.01)
    run.ask("pause")
    wait_for(lambda: run.read_status().state == "paused")
    step = run.read_status().step
    run.ask("save")
    run.ask("sample")
    wait_for(lambda: run.checkpoint(step).is_dir() and run.sample_file(step, 0).is_file())
    time.sleep(1)
    assert run.read_status().step == step < 60
    run.withdraw("pause")
    assert trainer.wait() == 0
    assert losses(run) == losses(whole) and saved(run, 60) == saved(whole, 60)
