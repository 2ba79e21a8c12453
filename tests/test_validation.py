"""Validation: paired against the base, the best kept, and all processes end a run alike."""

import io
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import PICTURE_PX, choose, randomise
from heard import heard
from PIL import Image
from safetensors.torch import load_file
from test_train import resume, stop_at, train
from test_training_data import data_of

import train_sd_lora
from lora_sd import inject, validation
from lora_sd import train as trainer
from lora_sd.config import config_from_values
from lora_sd.data.folder_options import FolderOptions
from lora_sd.errors import EXIT_RESUMABLE, AdapterError, ConfigError, UserError
from lora_sd.formats import load_adapter
from lora_sd.formats.safetensors_file import read_header
from lora_sd.layer_names import layer_shapes
from lora_sd.run_folder import RunFolder
from lora_sd.validation import BestFile, Paired, Validation, check_validation


@pytest.fixture
def data(base, image_folder, tmp_path):
    """Five pictures to train on and three to validate with, at two resolutions; of two sizes."""
    kept = tmp_path / "kept"
    kept.mkdir()
    for number, size in enumerate([(PICTURE_PX, PICTURE_PX), (PICTURE_PX, PICTURE_PX), (64, 16)]):
        Image.new("RGB", size, (number * 90, 20, 200)).save(kept / f"{number}.png")
    sizes = {"resolution_px": (PICTURE_PX, PICTURE_PX // 2), "max_aspect_ratio": 4.0}
    return data_of(
        base,
        FolderOptions(image_folder, resolution_px=(PICTURE_PX,)),
        FolderOptions(kept, kind="validation", caption="a wall", **sizes),
    )


@pytest.fixture
def learnt(base):
    """A base with an adapter that does something."""
    inject.attach(base.components, choose(base.components))
    randomise(base.components)
    return base


def make(base, data, batch_size=4, accelerator=None, **options):
    return Validation(
        base, data, 75, accelerator or Accelerator(), batch_size=batch_size, **options
    )


class Told(Validation):
    """A validation whose losses are given."""

    def __init__(self, base, data, losses, **options):
        super().__init__(base, data, 75, Accelerator(), batch_size=4, **options)
        self.coming = [1.0, *losses]

    def _errors(self):
        return torch.full((len(self._pictures), 4), self.coming.pop(0), dtype=torch.float64)


def test_a_fresh_adapter_gains_nothing_and_a_trained_one_is_compared_with_the_base(base, data):
    inject.attach(base.components, choose(base.components))
    one = make(base, data)
    first = one.measure(0)
    assert first["validation_loss"] == first["validation_base"] and first["validation_gain"] == 0
    randomise(base.components)
    later = one.measure(10)
    assert later["validation_base"] == first["validation_base"] != later["validation_loss"]
    assert later["validation_gain"] == pytest.approx(
        later["validation_base"] - later["validation_loss"]
    )


def test_the_base_is_the_base_whenever_it_is_measured(learnt, data):
    late = make(learnt, data)
    late.measure(100)
    assert {layer.scale for layer in inject.lora_layers(learnt.components).values()} == {1.0}
    inject.detach(learnt.components)
    assert torch.equal(make(learnt, data)._errors(), late._of_base)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_do_not_change_the_numbers(learnt, data, batch_size):
    expected = make(learnt, data)._errors()
    found = make(learnt, data, batch_size)._errors()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_what_does_not_fit_in_memory_is_measured_one_by_one(learnt, data, monkeypatch):
    expected, whole = make(learnt, data, 16)._errors(), validation.errors_of

    def one_at_most(base, objective, batch, max_tokens):
        if len(batch.names) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(base, objective, batch, max_tokens)

    monkeypatch.setattr(validation, "errors_of", one_at_most)
    found = make(learnt, data, 16)._errors()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_processes_share_the_work_and_know_the_same_to_the_bit(learnt, data):
    class OneOfTwo(Accelerator):
        num_processes, process_index = 2, 0

        def reduce(self, tensor, reduction):
            assert reduction == "sum"
            return tensor

    first, second = OneOfTwo(), OneOfTwo()
    second.process_index = 1
    shares = [make(learnt, data, accelerator=one)._errors() for one in (first, second)]
    assert all((share == 0).any() and (share > 0).any() for share in shares)
    assert torch.equal(shares[0] + shares[1], make(learnt, data)._errors())


def test_measuring_draws_nothing_from_the_global_generator(learnt, data):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    make(learnt, data).measure(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gain_is_paired_and_views_of_a_picture_count_once():
    noisy = torch.tensor([[1.0, 9.0], [1.0, 9.0], [50.0, 70.0], [50.0, 70.0]])
    better = noisy - torch.tensor([[0.1], [0.1], [0.3], [0.3]])
    paired = Paired.of(better.double(), noisy.double(), [0, 0, 1, 1])
    assert paired.gain == pytest.approx(0.2, abs=1e-5)
    assert paired.gain_error == pytest.approx(0.1, abs=1e-5)  # std of 0.1 and 0.3 over sqrt(2)
    alone = Paired.of(better.double(), noisy.double(), [0, 0, 0, 0])
    assert alone.gain_error is None and "validation_gain_error" not in alone.metrics()


def test_sentences_say_which_side_and_whether_it_is_clear():
    assert "0.0200 (standard error 0.0010) below" in Paired(0.1, 0.12, 0.02, 0.001).sentence()
    assert "0.0200 (standard error 0.0010) above" in Paired(0.1, 0.08, -0.02, 0.001).sentence()
    assert "not clearly apart" in Paired(0.1, 0.12, 0.02, 0.02).sentence()
    assert "below the base's" in Paired(0.1, 0.12, 0.02, None).sentence()


def test_the_best_is_kept_as_it_was_with_its_step(learnt, data, tmp_path):
    file = tmp_path / "best.safetensors"
    best = BestFile(file, torch.float32, "kohya", lambda: {"ss_output_name": "mine"})
    one = Told(learnt, data, [0.9, 0.8, math.nan, 0.85], best=best)
    one.measure(10)
    one.measure(20)
    expected = inject.collect(learnt.components)
    for layer in inject.lora_layers(learnt.components).values():
        torch.nn.init.zeros_(layer.lora_up.weight)
    one.measure(30)
    one.measure(40)
    found = load_adapter(file, layer_shapes(learnt.components))
    assert all(
        torch.equal(found.layers[name].low_rank(), layer.low_rank())
        for name, layer in expected.layers.items()
    )
    metadata = read_header(file).metadata
    assert metadata[validation.BEST_STEP] == "20" and metadata["ss_output_name"] == "mine"
    assert float(metadata[validation.BEST_LOSS]) == pytest.approx(0.8)


def test_a_best_that_cannot_be_written_is_told_and_tried_again(learnt, data, tmp_path, monkeypatch):
    file = tmp_path / "best.safetensors"
    best = BestFile(file, torch.float32, "kohya", dict)

    def full(*_):
        raise AdapterError("No room.")

    one = Told(learnt, data, [0.5, 0.8], best=best)
    with monkeypatch.context() as patch, heard() as lines:
        patch.setattr(validation, "save_adapter", full)
        one.measure(1)
    assert "could not be kept. No room." in lines[-1] and not file.exists()
    one.measure(2)  # no new lowest, but better than none
    assert read_header(file).metadata[validation.BEST_STEP] == "2"


def test_patience_counts_measurements_without_a_new_lowest(learnt, data):
    one = Told(learnt, data, [0.9, 0.95, 0.8, 0.8, 0.81], patience=2)
    over = []
    with heard() as lines:
        for step in range(1, 6):
            one.measure(step)
            over.append(one.is_over)
    assert over == [False, False, False, False, True]
    assert "below 0.8000, that of step 3, for 2 validations" in lines[-1]


def test_without_patience_it_is_never_over(learnt, data):
    one = Told(learnt, data, [0.5, 0.6, 0.7])
    for step in range(3):
        one.measure(step)
    assert not one.is_over


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_resumed_run_decides_as_an_uninterrupted_one(learnt, data, tmp_path, after):
    losses = [0.9, 0.7, 0.8, 0.7, 0.75]

    def best(name):
        return BestFile(tmp_path / name, torch.float32, "kohya", dict)

    straight = Told(learnt, data, losses, patience=3, best=best("straight"))
    for step in range(5):
        straight.measure(step)
    first = Told(learnt, data, losses, patience=3, best=best("resumed"))
    for step in range(after):
        first.measure(step)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second = Told(learnt, data, losses, patience=3, best=best("resumed"))
    second.load_state_dict(torch.load(stored, weights_only=True))
    second.coming = [1.0] * (after == 0) + losses[after:]
    for step in range(after, 5):
        second.measure(step)
    assert second.is_over == straight.is_over is True
    assert second.state_dict() == straight.state_dict()
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "straight").read_bytes()


def test_what_needs_pictures_is_refused_without_them():
    with pytest.raises(ConfigError, match="'train.keep_best and train.patience' go by"):
        check_validation(False, True, 3)
    with pytest.raises(ConfigError, match="kind: validation"):
        check_validation(False, True, 0)
    check_validation(True, True, 3)
    check_validation(False, False, 0)


@pytest.fixture
def validated(run_settings, tmp_path):
    """Settings of a run that validates after every step and keeps the best."""
    (tmp_path / "kept").mkdir()
    for number in range(3):
        picture = Image.new("RGB", (PICTURE_PX, PICTURE_PX), (number * 90, 20, 200))
        picture.save(tmp_path / "kept" / f"{number}.png")
    run_settings["data"]["folders"] = [
        {"folder": str(tmp_path / "kept"), "kind": "validation", "caption": "a wall"}
    ]
    run_settings["train"] |= {"validate_every_steps": 1, "keep_best": True}
    return run_settings


def test_a_run_that_goes_on_validates_as_one_that_was_not_stopped(validated, monkeypatch):
    straight = train(validated)
    validated["output"]["name"] = "stopped"
    stop_at(monkeypatch, 3)
    assert trainer.train(config_from_values(validated), "run") == EXIT_RESUMABLE
    monkeypatch.undo()
    run = RunFolder(straight.path.with_name("stopped"))
    assert resume(run) == 0
    numbers = [
        [{k: v for k, v in record.items() if k.startswith(("validation", "update"))} for record in
         one.read_metrics()]
        for one in (straight, run)
    ]  # fmt: skip
    assert numbers[0] == numbers[1] and all("validation_gain" in each for each in numbers[0])
    best = [load_file(one.best_file) for one in (straight, run)]
    assert all(torch.equal(best[0][key], best[1][key]) for key in best[0])


def test_a_measurement_of_other_pictures_is_forgotten(learnt, data):
    first = Told(learnt, data, [0.9, 0.5], about="these")
    first.measure(1)
    other = Told(learnt, data, [0.9, 0.7], about="those")
    with heard() as lines:
        other.load_state_dict(first.state_dict())
    assert "validation begins anew" in lines[-1]
    assert other.state_dict() == Told(learnt, data, [0.9], about="those").state_dict()


def test_a_better_one_of_an_abandoned_stretch_stays_the_best(learnt, data, tmp_path):
    best = BestFile(tmp_path / "best.safetensors", torch.float32, "kohya", dict)
    one = Told(learnt, data, [0.9, 0.5, 0.8, 0.4], best=best)
    one.measure(1)
    before = one.state_dict()
    one.measure(2)
    one.load_state_dict(before)  # gone back
    one.measure(3)
    assert read_header(best.path).metadata[validation.BEST_STEP] == "2"
    one.measure(4)
    assert read_header(best.path).metadata[validation.BEST_STEP] == "4"


def test_changed_validation_pictures_are_measured_anew(validated, monkeypatch):
    stop_at(monkeypatch, 3)
    assert trainer.train(config_from_values(validated), "run") == EXIT_RESUMABLE
    run = RunFolder(Path(validated["output"]["folder"]) / "run")
    held_out = Path(validated["data"]["folders"][0]["folder"])
    Image.new("RGB", (16, 16), "pink").save(held_out / "more.png")
    (held_out / "more.txt").write_text("a pink wall")
    assert train_sd_lora.main(["--resume", str(run.path), "--allow-change", "data"]) == 0
    assert "validation begins anew" in run.log_file.read_text()
    bases = {m["step"]: m["validation_base"] for m in run.read_metrics() if "validation_base" in m}
    assert len(set(bases.values())) == 2


def test_a_run_without_progress_ends_early_and_is_complete(validated, monkeypatch):
    errors = [1.0]

    def rising(self):
        errors.append(errors[-1] + 1)
        return torch.full((len(self._pictures), 4), errors[-2], dtype=torch.float64)

    monkeypatch.setattr(Validation, "_errors", rising)
    validated["train"] |= {"patience": 2, "steps": 20}
    run = train(validated)
    assert [record["step"] for record in run.read_metrics()] == [1, 2, 3]
    assert run.read_status().state == "finished" and run.checkpoint(3).is_dir()
    assert "the run ends early" in run.log_file.read_text()
    assert read_header(run.best_file).metadata[validation.BEST_STEP] == "1"
    before = run.adapter_file.stat().st_mtime_ns
    assert resume(run) == 0 and run.adapter_file.stat().st_mtime_ns == before


def test_keeping_the_best_of_nothing_is_refused_before_a_folder_is_made(run_settings):
    run_settings["train"]["keep_best"] = True
    with pytest.raises(UserError, match="kind: validation"):
        train(run_settings)
    assert not (Path(run_settings["output"]["folder"]) / "run").exists()
