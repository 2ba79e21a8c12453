"""What a run does with folders, sizes, captions, masks and caches."""

import os
import shutil
import signal

import pytest
import torch
import yaml
from conftest import PICTURE_PX
from PIL import Image
from test_train import losses, resume, stop_at, tensors, train

from lora_sd import run_data
from lora_sd import train as trainer
from lora_sd.base_model import BaseModel
from lora_sd.config import config_from_values
from lora_sd.data.training_data import TrainingData
from lora_sd.errors import EXIT_RESUMABLE, UserError
from lora_sd.formats.safetensors_file import read_header
from lora_sd.run_folder import RunFolder


@pytest.fixture
def varied(run_settings, image_folder, tmp_path):
    """Two sizes, kohya's repeats, regularisation, validation, masks and drawn tags."""
    often = image_folder / "2_sks wall"
    often.mkdir()
    Image.new("RGB", (32, 8), "orange").save(often / "wide.png")
    Image.new("L", (PICTURE_PX, PICTURE_PX), 128).save(image_folder / "0-mask.png")
    for name, colour in (("class", "grey"), ("kept", "pink")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (PICTURE_PX, PICTURE_PX), colour).save(tmp_path / name / "1.png")
    run_settings["data"] |= {
        "max_aspect_ratio": 4,
        "shuffle_tags": True,
        "trigger_word": "sks",
        "caption_suffix": ", plain, flat",
        "flip": True,
        "masks": "file",
        "folders": [
            {"folder": str(tmp_path / "class"), "kind": "regularisation", "caption": "a wall"},
            {"folder": str(tmp_path / "kept"), "kind": "validation", "caption": "a pink wall"},
        ],
    }
    run_settings["train"] |= {"batch_size": 4, "validate_every_steps": 2}
    return run_settings


def test_everything_at_once_is_trained_on_and_told(varied):
    run = train(varied)
    log = run.log_file.read_text()
    assert "5 for training; captions: 5 of .txt files; shuffle_tags, flip, masks" in log
    assert "2_sks wall': 1 for training, each 2 times an epoch; captions: 1 of the folder's" in log
    assert "1 for regularisation, as often as all others together" in log
    assert "1 for validation; captions" in log
    assert "8 pictures used, 0 left out. An epoch shows 14: 16x16: 12, 32x8: 2." in log
    measured = {
        m["step"]: m["validation_loss"] for m in run.read_metrics() if "validation_loss" in m
    }
    assert list(measured) == [2, 4, 6] and len(set(measured.values())) == 3
    metadata = read_header(run.adapter_file).metadata
    assert metadata["ss_num_train_images"] == "6" and metadata["ss_num_reg_images"] == "1"
    assert '"resolution": [32, 8]' in metadata["ss_bucket_info"]
    assert str(varied["data"]["folder"]) not in str(metadata)


@pytest.mark.parametrize("stop_after", [1, 4])
def test_stopped_and_resumed_it_is_the_same_run(varied, monkeypatch, stop_after):
    straight = train(varied)
    varied["output"]["name"] = "stopped"
    stop_at(monkeypatch, stop_after)
    assert trainer.train(config_from_values(varied), "run") == EXIT_RESUMABLE
    monkeypatch.undo()
    run = RunFolder(straight.path.with_name("stopped"))
    assert resume(run) == 0
    assert losses(run) == losses(straight) and tensors(run, 6) == tensors(straight, 6)


def test_the_cache_changes_nothing_but_the_time(varied, monkeypatch):
    on_disk = train(varied)
    varied["output"]["name"] = "memory"
    varied["data"]["cache"] = "memory"
    in_memory = train(varied)
    assert losses(in_memory) == losses(on_disk) and tensors(in_memory, 6) == tensors(on_disk, 6)

    varied["output"]["name"] = "warm"
    varied["data"]["cache"] = "disk"
    monkeypatch.setattr(run_data, "probe", lambda base, views, most: measured(base))
    monkeypatch.setattr(BaseModel, "encode_picture", lambda *_: pytest.fail("it was encoded"))
    assert losses(train(varied)) == losses(on_disk)


def measured(base):
    """Something to try the base on, without encoding a picture."""
    latents = torch.zeros(1, 4, 8, 8)
    return latents, base.encode_text(["a wall"]), torch.zeros(1, 6, dtype=torch.int64)


def test_batches_and_accumulation_see_the_same_in_all_sizes(varied):
    whole = train(varied)
    varied["train"] |= {"batch_size": 1, "gradient_accumulation": 4}
    varied["output"]["name"] = "parts"
    parts = train(varied)
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in whole.read_metrics()]
        assert [record[key] for record in parts.read_metrics()] == pytest.approx(expected, rel=1e-4)


def test_a_damaged_entry_is_made_again_and_told(run_settings):
    first = train(run_settings)
    entries = sorted((first.path.parent / ".cache").rglob("*.safetensors"))
    data = bytearray(entries[0].read_bytes())
    data[-3] ^= 1
    entries[0].write_bytes(data)
    run_settings["output"]["name"] = "again"
    again = train(run_settings)
    assert (
        "Damaged entries of the cache that have been made again: 1." in again.log_file.read_text()
    )
    assert losses(again) == losses(first)


@pytest.mark.parametrize(("drawn_texts", "kept"), [(False, set()), (True, {"text_encoder"})])
def test_what_is_not_needed_leaves_memory(run_settings, monkeypatch, drawn_texts, kept):
    in_memory = []
    batches = TrainingData.batches

    def watched(self, *arguments):
        parts = {"vae": self._base.vae, **self._base.components}
        in_memory.append(
            {name for name, one in parts.items() if not next(one.parameters()).is_meta}
        )
        return batches(self, *arguments)

    monkeypatch.setattr(TrainingData, "batches", watched)
    run_settings["data"] |= {"tag_dropout": 0.5 * drawn_texts}
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2, "every_steps": 3}
    run = train(run_settings)
    assert in_memory == [{"unet"} | kept] * 6
    assert run.grid_file.is_file() and len(run.sample_files()) == 3


def test_class_pictures_are_drawn_once(run_settings, tmp_path):
    folder = tmp_path / "drawn"
    entry = {"folder": str(folder), "kind": "regularisation", "caption": "a wall"}
    run_settings["data"]["folders"] = [{**entry, "class_pictures": 2}]
    run_settings["sample"] = {"steps": 2}
    run = train(run_settings)
    assert len(list(folder.glob("*.png"))) == 2
    assert "2 class pictures were drawn" in run.log_file.read_text()
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    run_settings["output"]["name"] = "again"
    assert losses(train(run_settings)) == losses(run)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written


def test_a_stop_while_class_pictures_are_drawn_is_resumable(run_settings, tmp_path, monkeypatch):
    entry = {"folder": str(tmp_path / "drawn"), "kind": "regularisation", "caption": "a wall"}
    run_settings["data"]["folders"] = [{**entry, "class_pictures": 2}]
    run_settings["sample"] = {"steps": 2}
    draw = run_data.draw_missing

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return draw(*arguments)

    monkeypatch.setattr(run_data, "draw_missing", interrupted)
    assert trainer.train(config_from_values(run_settings), "run") == EXIT_RESUMABLE
    run = RunFolder(run_settings["output"]["folder"] + "/run")
    assert run.read_status().state == "stopped"
    monkeypatch.undo()
    assert resume(run) == 0


def test_the_cache_may_be_deleted_during_a_run(run_settings, monkeypatch):
    straight = train(run_settings)
    run_settings["output"]["name"] = "again"
    append = RunFolder.append_metrics

    def delete_and_append(self, values):
        shutil.rmtree(straight.path.parent / ".cache", ignore_errors=True)
        append(self, values)

    monkeypatch.setattr(RunFolder, "append_metrics", delete_and_append)
    assert losses(train(run_settings)) == losses(straight)


def test_training_without_captions(run_settings, image_folder):
    for file in image_folder.glob("*.txt"):
        file.unlink()
    run_settings["data"]["caption"] = None
    with pytest.raises(UserError, match="or set data.caption, which may be empty"):
        train(run_settings)
    run_settings["data"]["caption"] = ""
    log = train(run_settings).log_file.read_text()
    assert "captions: 5 of the setting 'caption'" in log


def test_bad_pictures_stop_the_run_or_are_left_out_and_told(run_settings, image_folder):
    (image_folder / "broken.png").write_bytes(b"\x89PNG")
    (image_folder / "broken.txt").write_text("broken")
    with pytest.raises(UserError, match=r"broken\.png"):
        train(run_settings)
    run_settings["data"]["bad_pictures"] = "skip"
    log = train(run_settings).log_file.read_text()
    assert "Left out: " in log and "broken.png" in log and "5 pictures used, 1 left out" in log


def test_a_stop_while_encoding_goes_on_where_it_was(run_settings, image_folder, monkeypatch):
    for number in range(40):
        colour = (number, 0, 90)
        Image.new("RGB", (PICTURE_PX, PICTURE_PX), colour).save(image_folder / f"more{number}.png")
    kept = {"folder": str(image_folder), "kind": "validation"}
    run_settings["data"] |= {"caption": "a wall", "folders": [kept]}
    encode = BaseModel.encode_picture
    calls = []

    def counted(self, pixels):
        calls.append(pixels)
        if len(calls) == run_data.PROBED + 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    monkeypatch.setattr(BaseModel, "encode_picture", counted)
    assert trainer.train(config_from_values(run_settings), "run") == EXIT_RESUMABLE
    before = len(calls) - run_data.PROBED
    assert 5 <= before < 45
    assert resume(RunFolder(run_settings["output"]["folder"] + "/run")) == 0
    assert len(calls) == 45 + run_data.PROBED  # none of them twice, and the base is known


def test_the_written_config_says_the_same_again(varied):
    first = train(varied)
    again = yaml.safe_load(first.config_file.read_text())
    again["output"]["name"] = "again"
    assert losses(train(again)) == losses(first)


def test_pictures_below_the_resolution_are_told_and_enlarged_where_asked(run_settings):
    run_settings["data"]["resolution_px"] = 32
    log = train(run_settings).log_file.read_text()
    assert "5 pictures are smaller" in log and "shows 5: 16x16: 5" in log
    run_settings["data"]["upscale"] = True
    run_settings["output"]["name"] = "enlarged"
    log = train(run_settings).log_file.read_text()
    assert "smaller" not in log and "shows 5: 32x32: 5" in log


def test_samples_are_of_a_size_that_the_model_takes(run_settings):
    run_settings["data"]["resolution_px"] = [24, 16]
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2}
    run = train(run_settings)
    assert Image.open(run.sample_files()[0]).size == (24, 24)
