"""Whole runs with each optimizer: stopped and resumed, they are the same run."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_sd_lora
from lora_sd import train as trainer
from lora_sd.config import config_from_values
from lora_sd.errors import EXIT_RESUMABLE
from lora_sd.optimizers.by_name import KINDS
from lora_sd.run_folder import RunFolder

STEPS, STOP_AFTER = 4, 2
QUICK = ("adamw_8bit", "prodigy", "adamw_schedulefree")  # those with states of their own kinds


def start(settings, name: str) -> tuple[int, RunFolder]:
    settings["output"]["name"] = name
    status = trainer.train(config_from_values(settings), name)
    return status, RunFolder(Path(settings["output"]["folder"]) / name)


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint(STEPS) / "adapter.safetensors")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in KINDS],
)
def test_a_stopped_and_resumed_run_is_the_same_run(run_settings, monkeypatch, name):
    rate = {"prodigy": 1.0, "came": 1e-3}.get(name, 1e-2)
    schedule = "constant" if name == "adamw_schedulefree" else "cosine"
    run_settings["optimizer"] |= {"name": name, "learning_rate": rate, "schedule": schedule}
    run_settings["adapter"] |= {"preset": "full", "rank": 4, "clamp_ranks": True}
    run_settings["optimizer"] |= {"lora_plus_ratio": 2.0, "conv_learning_rate": rate / 2}
    run_settings["train"]["steps"] = STEPS
    assert start(run_settings, "straight")[0] == 0
    append = RunFolder.append_metrics

    def append_and_stop(self: RunFolder, values: dict) -> None:
        append(self, values)
        if values["step"] == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "append_metrics", append_and_stop)
    status, run = start(run_settings, "stopped")
    monkeypatch.undo()
    assert status == EXIT_RESUMABLE
    assert train_sd_lora.main(["--resume", str(run.path)]) == 0
    straight = RunFolder(run.path.with_name("straight"))
    assert [one["loss"] for one in run.read_metrics()] == [
        one["loss"] for one in straight.read_metrics()
    ]
    first, second = weights(straight), weights(run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if name != "prodigy":  # which has hardly begun
        assert all(values.abs().max() > 0 for values in first.values())
