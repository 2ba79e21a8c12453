"""Run folders: made once, read at any moment."""

import json
import os

import psutil
import pytest

from lora_sd.errors import RunError
from lora_sd.run_folder import RunFolder, Status, create_run, list_runs, open_run


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, "cats", "x", "train: {}")


def test_a_default_name_gets_a_number_when_it_is_taken(tmp_path):
    names = [create_run(tmp_path, None, "my style!", "").name for _ in range(3)]
    assert names == ["my-style", "my-style-2", "my-style-3"]


def test_a_chosen_name_that_is_taken_is_an_error(run):
    with pytest.raises(RunError, match="exists already"):
        create_run(run.path.parent, "cats", "x", "other")
    assert run.config_file.read_text() == "train: {}"


def test_status_says_who_is_at_work(run):
    run.write_status(Status("training", 3, 10))
    status = run.read_status()
    assert (status.state, status.step, status.pid) == ("training", 3, os.getpid())
    assert status.is_alive() and not status.is_interrupted() and status.seconds_silent() < 5


def test_a_dead_or_reused_pid_is_an_interrupted_run(run):
    run.write_status(Status("training"))
    status = run.read_status()
    status.process_started -= 1000  # our own pid, as if another program had it
    assert status.is_interrupted()
    status.pid = max(psutil.pids()) + 1000
    assert status.is_interrupted()
    status.state = "finished"
    assert not status.is_interrupted()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"state": "odd"}', '{"state": 3}', "\0"])
def test_a_status_that_cannot_be_understood_is_none(run, text):
    run.status_file.write_text(text)
    assert run.read_status() is None


def test_metrics_leave_out_a_line_that_is_being_written(run):
    run.append_metrics({"step": 1, "loss": 0.5})
    run.append_metrics({"step": 2, "loss": 0.4})
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 3, "lo')
    assert [record["step"] for record in run.read_metrics()] == [1, 2]
    run.cut_metrics(1)
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}
    ]


def test_runs_are_opened_by_name_only(run):
    assert open_run(run.path.parent, "cats").path == run.path
    for name in ("dogs", "../cats", "", "/etc", "cats/", "."):
        with pytest.raises(RunError):
            open_run(run.path.parent, name)
    assert [found.name for found in list_runs(run.path.parent)] == ["cats"]


def test_adapters_are_listed_result_first_then_newest(run):
    for step in (2, 10):
        run.checkpoint(step).mkdir()
        (run.checkpoint(step) / "adapter.safetensors").touch()
    run.adapter_file.touch()
    assert run.adapter_files() == [
        run.adapter_file,
        run.checkpoint(10) / "adapter.safetensors",
        run.checkpoint(2) / "adapter.safetensors",
    ]
    assert isinstance(run, RunFolder)
