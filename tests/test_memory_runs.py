"""Whole runs with memory settings: they end, draw, and go on to the bit."""

import shutil

import pytest
from test_memory import SETTINGS
from test_train import losses, resume, tensors, train

from lora_sd.errors import UserError

QUICK = ("none", "int8", "all")


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(one, marks=() if name in QUICK else pytest.mark.slow, id=name)
        for name, one in SETTINGS.items()
    ],
)
def test_a_run_ends_with_its_pictures_and_a_whole_file(run_settings, settings):
    run_settings["memory"] = {**settings}
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2, "scales": [0.0, 1.0]}
    run = train(run_settings)
    log = run.log_file.read_text()
    assert "could not be drawn" not in log and run.grid_file.is_file()
    assert "match in" in log or "match by" in log
    assert ("linear layers of the UNet are kept in" in log) == ("base_weights" in settings)


@pytest.mark.parametrize("settings", [SETTINGS["int8"], SETTINGS["all"]], ids=["int8", "all"])
def test_a_resumed_run_packs_the_same_weights(run_settings, settings):
    run_settings["memory"] = {**settings}
    straight = train(run_settings)
    again = type(straight)(straight.path.with_name("again"))
    shutil.copytree(straight.path, again.path)
    shutil.rmtree(again.checkpoint(6))
    again.adapter_file.unlink()
    assert resume(again) == 0
    assert losses(again) == losses(straight)
    assert tensors(again, 6) == tensors(straight, 6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_compiles(run_settings):
    run_settings["train"]["steps"] = 2
    run_settings["adapter"]["preset"] = "attention"
    run_settings["memory"] = {"compile": True, "base_weights": "int8"}
    compiled = losses(train(run_settings))
    run_settings["memory"]["compile"] = False
    run_settings["output"]["name"] = "plain"
    assert compiled == pytest.approx(losses(train(run_settings)), rel=1e-3)


def test_what_cannot_be_is_said_before_a_folder_is_made(run_settings, tmp_path):
    run_settings["memory"] = {"base_weights": "nf4"}
    run_settings["adapter"]["dora"] = "input"
    with pytest.raises(UserError, match="'adapter.dora' learns the norms"):
        train(run_settings)
    assert not (tmp_path / "outputs" / "run").exists()
