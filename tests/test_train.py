"""The trainer: only adapters learn, nothing is lost, and a resumed run is the same run."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PROJECT

import train_sd_lora
from lora_sd import samples
from lora_sd import train as trainer
from lora_sd.adapter import Adapter
from lora_sd.base_model import BaseModel
from lora_sd.config import config_from_values
from lora_sd.data.training_data import TrainingData
from lora_sd.errors import EXIT_RESUMABLE, OutOfMemory, RunError, UserError
from lora_sd.formats import load_adapter
from lora_sd.layer_names import layer_shapes
from lora_sd.objective import Objective
from lora_sd.run_folder import RunFolder

Settings = dict[str, dict]


def train(settings: Settings) -> RunFolder:
    """Train in this process; the run's folder."""
    assert trainer.train(config_from_values(settings), "run") == 0
    return RunFolder(Path(settings["output"]["folder"]) / (settings["output"]["name"] or "run"))


def resume(run: RunFolder) -> int:
    return train_sd_lora.main(["--resume", str(run.path)])


def losses(run: RunFolder) -> list[float]:
    return [record["loss"] for record in run.read_metrics()]


def test_a_run_leaves_what_the_folder_promises(run_settings, base):
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2, "every_steps": 3}
    run = train(run_settings)
    assert run.read_status().state == "finished"
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in run.sample_files()] == [
        "step_000000_00.png",
        "step_000003_00.png",
        "step_000006_00.png",
    ]
    assert run.grid_file.is_file()
    assert [folder.name for folder in sorted(run.checkpoints.iterdir())] == [
        "step_000004",
        "step_000006",
    ]
    assert "Adapted layers" in run.log_file.read_text()
    adapter = load_adapter(run.adapter_file, layer_shapes(base.components))
    assert all(layer.up.abs().max() > 0 for layer in adapter.layers.values())


def test_config_yaml_runs_the_same_run_again(run_settings):
    first = train(run_settings)
    again = yaml.safe_load(first.config_file.read_text())
    again["output"]["name"] = "again"
    second = train(again)
    assert losses(second) == losses(first)


def test_the_same_seed_gives_the_same_file(run_settings):
    first = train(run_settings).adapter_file.read_bytes()
    run_settings["output"]["folder"] += "-again"
    assert train(run_settings).adapter_file.read_bytes()[-2000:] == first[-2000:]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5])
def test_a_stopped_and_resumed_run_is_the_same_run(run_settings, monkeypatch, stop_after):
    run_settings["train"]["gradient_accumulation"] = 2
    straight = train(run_settings)
    run_settings["output"]["name"] = "stopped"
    stop_at(monkeypatch, stop_after)
    assert trainer.train(config_from_values(run_settings), "run") == EXIT_RESUMABLE
    run = RunFolder(straight.path.with_name("stopped"))
    assert run.read_status().state == "stopped"
    monkeypatch.undo()
    assert resume(run) == 0
    assert losses(run) == losses(straight)
    assert tensors(run, 6) == tensors(straight, 6)


def stop_at(monkeypatch, step: int) -> None:
    """Make the trainer see a stop request after `step` steps."""
    append = RunFolder.append_metrics

    def append_and_stop(self: RunFolder, values: dict) -> None:
        append(self, values)
        if values["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunFolder, "append_metrics", append_and_stop)


def tensors(run: RunFolder, step: int) -> dict[str, list[float]]:
    """Adapter and optimizer of a checkpoint as plain numbers."""
    from safetensors.torch import load_file

    state = torch.load(run.checkpoint(step) / "state.pt", weights_only=True)
    found = {
        k: v.flatten().tolist()
        for k, v in load_file(run.checkpoint(step) / "adapter.safetensors").items()
    }
    for index, values in state["optimizer"]["state"].items():
        found |= {f"{index}.{key}": value.flatten().tolist() for key, value in values.items()}
    return found


@pytest.mark.parametrize("doing", ["encode", "generate"])
def test_stopping_while_encoding_or_sampling_is_resumable(run_settings, monkeypatch, doing):
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 3}
    run_settings["data"]["cache"] = "memory"
    straight = train(run_settings)
    run_settings["output"]["name"] = "stopped"
    place = TrainingData if doing == "encode" else samples
    original = getattr(place, doing)

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **options)

    monkeypatch.setattr(place, doing, interrupted)
    assert trainer.train(config_from_values(run_settings), "run") == EXIT_RESUMABLE
    run = RunFolder(straight.path.with_name("stopped"))
    assert run.sample_files() == [] and run.read_status().state == "stopped"
    monkeypatch.undo()
    assert resume(run) == 0
    assert losses(run) == losses(straight)
    assert [f.name for f in run.sample_files()] == [f.name for f in straight.sample_files()]


def test_samples_that_cannot_be_drawn_do_not_end_the_run(run_settings, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 3, "every_steps": 2}
    monkeypatch.setattr(samples, "generate", fail)
    monkeypatch.setattr(samples, "generate_at_scales", fail)
    run = train(run_settings)
    assert run.read_status().state == "finished" and run.adapter_file.is_file()
    assert "could not be drawn" in run.log_file.read_text()


@pytest.mark.parametrize("file", ["state.pt", "adapter.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_made_again(run_settings, file, damage):
    run = train(run_settings)
    expected = tensors(run, 6)
    run.adapter_file.unlink()
    broken = run.checkpoint(6) / file
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 128
    broken.unlink()
    if damage != "missing":
        broken.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    assert resume(run) == 0
    assert "passed over" in run.log_file.read_text()
    assert tensors(run, 6) == expected


def test_all_checkpoints_damaged_is_an_error_and_nothing_is_deleted(run_settings):
    run = train(run_settings)
    run.adapter_file.unlink()
    for folder in run.checkpoints.iterdir():
        (folder / "state.pt").write_bytes(b"")
    before = sorted(run.path.rglob("*"))
    with pytest.raises(RunError, match="No checkpoint"):
        resume(run)
    assert [f for f in before if not f.exists()] == []


def test_accumulation_and_batch_give_the_same_losses_and_gradients(run_settings):
    run_settings["train"]["batch_size"] = 4
    whole = train(run_settings)
    run_settings["train"] |= {"batch_size": 2, "gradient_accumulation": 2}
    run_settings["output"]["name"] = "accumulated"
    parts = train(run_settings)
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in whole.read_metrics()]
        assert [record[key] for record in parts.read_metrics()] == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_that_does_not_hold_what_was_saved_is_no_checkpoint(run_settings, monkeypatch):
    original = trainer.checkpoint.save_adapter

    def spoiled(adapter, path, *arguments, **options):
        name, layer = next(iter(adapter.layers.items()))
        other = replace(layer, up=layer.up + 1)
        original(Adapter({**adapter.layers, name: other}), path, *arguments, **options)

    monkeypatch.setattr(trainer.checkpoint, "save_adapter", spoiled)
    with pytest.raises(RunError, match="read back of adapter.safetensors is not what was saved"):
        train(run_settings)
    run = RunFolder(Path(run_settings["output"]["folder"]) / "run")
    assert list(run.checkpoints.iterdir()) == []


def test_a_finished_run_is_left_alone(run_settings):
    run = train(run_settings)
    before = {file: file.stat().st_mtime_ns for file in run.path.rglob("*.safetensors")}
    assert resume(run) == 0
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_changed_pictures_stop_a_resume_and_the_run_stays_as_it_is(run_settings):
    run = train(run_settings)
    status = run.status_file.read_bytes()
    (Path(run_settings["data"]["folder"]) / "0.txt").write_text("something else")
    with pytest.raises(RunError, match="captions have changed"):
        resume(run)
    assert run.status_file.read_bytes() == status


def test_a_result_without_checkpoints_is_never_trained_over(run_settings):
    run = train(run_settings)
    before = run.adapter_file.read_bytes()
    for folder in run.checkpoints.iterdir():
        shutil.rmtree(folder)
    with pytest.raises(RunError, match="no checkpoints to go on from"):
        resume(run)
    assert run.adapter_file.read_bytes() == before


def test_a_run_that_was_killed_before_its_grid_draws_it_when_resumed(run_settings):
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2}
    run = train(run_settings)
    run.grid_file.unlink()
    assert resume(run) == 0
    assert run.grid_file.is_file()


def test_strangers_among_the_checkpoints_are_left_alone(run_settings):
    run_settings["output"]["keep_checkpoints"] = 2
    run = train(run_settings)
    run.adapter_file.unlink()
    (run.checkpoints / "step_000004 copy").mkdir()
    (run.checkpoints / "step_notes").write_text("mine")
    assert resume(run) == 0
    assert (run.checkpoints / "step_notes").read_text() == "mine"


def test_a_taken_name_is_refused_before_anything_is_written(run_settings):
    run = train(run_settings)
    before = run.status_file.read_bytes()
    with pytest.raises(RunError, match="exists already"):
        train(run_settings)
    assert run.status_file.read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run(run_settings, monkeypatch):
    monkeypatch.setattr(
        Objective, "errors", lambda self, predicted, *_: predicted.flatten(1).mean(1) * torch.nan
    )
    with pytest.raises(RunError, match="loss became nan.* at step 1"):
        train(run_settings)
    run = RunFolder(Path(run_settings["output"]["folder"]) / "run")
    assert run.read_status().state == "failed" and not run.adapter_file.exists()


def test_user_errors_end_with_status_2_and_sentences(run_settings, tmp_path):
    run_settings["data"]["folder"] = str(tmp_path / "nowhere")
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(run_settings))
    done = subprocess.run(
        [sys.executable, "train_sd_lora.py", "--config", str(file)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "nowhere' does not exist" in done.stderr and "Traceback" not in done.stderr
    assert not Path(run_settings["output"]["folder"]).exists()


def test_problems_of_data_model_and_layers_are_told_together(run_settings):
    run_settings["data"] |= {"folder": "nowhere", "resolution_px": 40}
    run_settings["adapter"] |= {"rank": 500}
    with pytest.raises(UserError) as caught:
        train(run_settings)
    said = str(caught.value)
    assert "nowhere" in said and "'adapter.rank' is 500" in said
    assert not Path(run_settings["output"]["folder"]).exists()


def test_ctrl_c_saves_and_says_how_to_go_on(run_settings, tmp_path):
    run_settings["train"]["steps"] = 100_000
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(run_settings))
    process = subprocess.Popen(
        [sys.executable, "train_sd_lora.py", "--config", str(file)],
        cwd=PROJECT,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = RunFolder(Path(run_settings["output"]["folder"]) / "run")
    deadline = time.monotonic() + 60
    while len(run.read_metrics()) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == EXIT_RESUMABLE
    assert f"--resume {run.path}" in errors
    assert run.checkpoint(run.read_status().step).is_dir()


def test_every_shipped_config_is_valid():
    for file in sorted((PROJECT / "configs").rglob("*.yaml")):
        config_from_values(yaml.safe_load(file.read_text()))


def test_problems_are_all_told_at_once(run_settings):
    run_settings["train"] |= {"steps": 0, "learning_rat": 1}
    with pytest.raises(UserError) as caught:
        config_from_values(run_settings)
    assert len(caught.value.problems) == 2 and "learning_rate" in str(caught.value)


def test_kill_9_loses_at_most_the_work_since_the_last_save(run_settings, tmp_path):
    run_settings["train"]["steps"] = 40
    straight = train(run_settings)
    run_settings["output"]["name"] = "killed"
    run = RunFolder(straight.path.with_name("killed"))
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(run_settings))
    arguments = ["--config", str(file)]
    for steps_before_the_kill in (5, 22):
        process = subprocess.Popen(
            [sys.executable, "train_sd_lora.py", *arguments], cwd=PROJECT, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while len(run.read_metrics()) < steps_before_the_kill and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert run.read_status().is_interrupted()
        saved = max(int(folder.name[5:]) for folder in run.checkpoints.glob("step_*"))
        assert saved >= run.read_metrics()[-1]["step"] - 2
        arguments = ["--resume", str(run.path)]
    assert resume(run) == 0
    assert losses(run) == losses(straight)
    assert tensors(run, 40) == tensors(straight, 40)
    assert list(run.checkpoints.glob(".tmp-*")) == []


def test_a_second_trainer_is_told_that_the_folder_is_taken(run_settings, monkeypatch):
    told = []

    def resume_meanwhile(self: RunFolder, values: dict) -> None:
        if not told:
            with pytest.raises(RunError) as caught:
                resume(self)
            told.append(str(caught.value))

    monkeypatch.setattr(RunFolder, "append_metrics", resume_meanwhile)
    train(run_settings)
    assert f"is being trained by process {os.getpid()}" in told[0]


def runs_out_of_memory(monkeypatch: pytest.MonkeyPatch, at: int, times: int = 1) -> None:
    """The model runs out of memory at its n-th call in training, so many times in a row."""
    predict, calls = BaseModel.predict, count(1)

    def predicts(self, *args):
        if self.unet.training and at <= next(calls) < at + times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return predict(self, *args)

    monkeypatch.setattr(BaseModel, "predict", predicts)


def test_a_run_out_of_memory_stops_with_advice_and_goes_on_as_the_same(run_settings, monkeypatch):
    run_settings["output"]["name"] = "straight"
    straight = train(run_settings)
    run_settings["output"]["name"] = "short"
    with monkeypatch.context() as patch:
        runs_out_of_memory(patch, at=4)
        with pytest.raises(OutOfMemory, match="Memory ran out in step") as caught:
            train(run_settings)
    assert caught.value.exit_status == 7 and "plan" in str(caught.value)
    run = RunFolder(straight.path.with_name("short"))
    assert run.read_status().state == "failed" and 0 < len(losses(run)) < 6
    assert resume(run) == 0
    assert losses(run) == losses(straight) and tensors(run, 6) == tensors(straight, 6)


def test_a_run_out_of_memory_may_go_on_with_less(run_settings, monkeypatch):
    run_settings["output"]["name"] = "straight"
    straight = train(run_settings)
    run_settings["output"]["name"] = "less"
    run_settings["memory"] = {"on_out_of_memory": "step_down"}
    runs_out_of_memory(monkeypatch, at=4, times=2)
    run = train(run_settings)
    assert losses(run) == pytest.approx(losses(straight), rel=1e-5)
    said = run.log_file.read_text()
    assert "gradient checkpointing is on" in said and "at most 1 pictures" in said
