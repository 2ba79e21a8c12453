"""Trackers: what they are given arrives once, however often a run goes on; failing, they go off."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
from heard import heard
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_sd import trackers
from lora_sd.errors import ConfigError
from lora_sd.run_folder import create_run
from lora_sd.trackers import Trackers, check_trackers


@pytest.fixture
def run(tmp_path):
    return create_run(tmp_path, "run", "run", "")


def sample(run, step, index):
    info = PngInfo()
    info.add_text("prompt", "a red wall")
    file = run.sample_file(step, index)
    Image.new("RGB", (16, 8), (step * 20, 0, 0)).save(file, pnginfo=info)
    return file


class FakeRun:
    def __init__(self, module, **options):
        self.module, self.options, self.finished = module, options, False

    def log(self, values, step):
        if self.module.fails:
            raise ConnectionError("no network")
        self.module.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A module of that name that keeps what it is given."""
    module = ModuleType("wandb")
    module.logged, module.runs, module.fails = [], [], False
    module.Image = lambda file, caption: SimpleNamespace(file=file, caption=caption)

    def init(**options):
        module.runs.append(FakeRun(module, **options))
        return module.runs[-1]

    module.init = init
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def read_tensorboard(run):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def test_curves_and_pictures_arrive_in_tensorboard(run):
    pytest.importorskip("tensorboard")
    one = Trackers(run, 0, is_main=True, tensorboard=True)
    one.pictures(0, [sample(run, 0, 0)])
    blocks = {"mid": 0.1, "up.0": float("nan")}
    one.log(1, {"step": 1, "loss": 0.5, "lr": 1e-4, "note": "x", "update_blocks": blocks})
    one.pictures(2, [sample(run, 2, 0), sample(run, 2, 1)])
    one.close()
    found = read_tensorboard(run)
    assert found.Tags()["scalars"] == ["loss", "lr", "update_blocks/mid"]
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 0.5)]
    assert [e.step for e in found.Images("samples/00")] == [0, 2]
    assert (found.Images("samples/01")[0].width, found.Images("samples/01")[0].height) == (16, 8)


def test_a_run_that_goes_on_leaves_no_step_twice_and_none_out(run):
    pytest.importorskip("tensorboard")
    first = Trackers(run, 0, is_main=True, tensorboard=True)
    for step in range(1, 8):
        first.log(step, {"loss": step})
        if step == 4:
            first.pictures(4, [sample(run, 4, 0)])
            first.flush()
    first.close()
    second = Trackers(run, 4, is_main=True, tensorboard=True)
    for step in range(5, 10):
        second.log(step, {"loss": 10 * step})
    second.close()
    found = read_tensorboard(run)
    values = [(event.step, event.value) for event in found.Scalars("loss")]
    assert values == [(s, s) for s in range(1, 5)] + [(s, 10 * s) for s in range(5, 10)]
    assert [event.step for event in found.Images("samples/00")] == [4]


def test_what_was_flushed_survives_a_kill(run):
    pytest.importorskip("tensorboard")
    one = Trackers(run, 0, is_main=True, tensorboard=True)
    one.log(1, {"loss": 1.0})
    one.flush()
    assert [event.step for event in read_tensorboard(run).Scalars("loss")] == [1]
    one.close()


def test_curves_and_pictures_arrive_in_wandb_under_one_id(run, wandb):
    for step in (0, 5):
        one = Trackers(run, step, is_main=True, wandb_project="mine", settings={"train": {"a": 1}})
        one.log(step + 1, {"step": step + 1, "loss": 0.5, "update_blocks": {"mid": 0.1}})
        one.pictures(step + 1, [sample(run, step + 1, 0)])
        one.close()
    first, second = wandb.runs
    assert first.options == second.options
    assert first.options["project"] == "mine" and first.options["resume"] == "allow"
    assert first.options["name"] == "run" and first.options["dir"] == str(run.path)
    assert first.options["config"] == {"train": {"a": 1}} and len(first.options["id"]) == 16
    assert wandb.logged[0] == (1, {"loss": 0.5, "update_blocks/mid": 0.1})
    assert wandb.logged[1][1]["samples/00"].caption == "a red wall"
    assert first.finished and second.finished
    json.dumps(wandb.logged[0])


def test_runs_of_one_name_have_ids_of_their_own(run, wandb, tmp_path):
    other = create_run(tmp_path / "elsewhere", "run", "run", "")
    for one in (run, other):
        Trackers(one, 0, is_main=True, wandb_project="mine")
    assert wandb.runs[0].options["id"] != wandb.runs[1].options["id"]


def test_one_that_fails_is_told_once_and_the_others_go_on(run, wandb):
    pytest.importorskip("tensorboard")
    one = Trackers(run, 0, is_main=True, tensorboard=True, wandb_project="mine")
    wandb.fails = True
    with heard() as lines:
        for step in (1, 2, 3):
            one.log(step, {"loss": 1.0})
        one.close()
    assert len(lines) == 1 and "Weights & Biases has failed" in lines[0]
    assert "ConnectionError: no network" in lines[0]
    assert len(read_tensorboard(run).Scalars("loss")) == 3


def test_one_that_cannot_begin_is_told_and_the_run_goes_on(run, wandb, monkeypatch):
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    (run.path / "tensorboard").write_text("in the way")
    with heard() as lines:
        one = Trackers(run, 0, is_main=True, tensorboard=True, wandb_project="mine")
        one.log(1, {"loss": 1.0})
        one.close()
    assert [line.split(" has failed")[0] for line in lines] == [
        "Note: TensorBoard", "Note: Weights & Biases",
    ]  # fmt: skip


def test_a_damaged_picture_is_no_reason_to_end(run):
    pytest.importorskip("tensorboard")
    one = Trackers(run, 0, is_main=True, tensorboard=True)
    with heard() as lines:
        one.pictures(1, [run.sample_file(1, 0)])
    assert "FileNotFoundError" in lines[0]


def test_other_processes_write_nothing(run):
    one = Trackers(run, 0, is_main=False, tensorboard=True, wandb_project="mine")
    one.log(1, {"loss": 1.0})
    one.pictures(1, [run.sample_file(1, 0)])
    one.close()
    assert not (run.path / "tensorboard").exists() and not (run.path / "wandb").exists()


def test_what_is_not_installed_is_told_before_the_start(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(ConfigError) as caught:
        check_trackers(True, "mine")
    assert len(caught.value.problems) == 2 and "`pip install wandb`" in str(caught.value)
    check_trackers(False, None)
    monkeypatch.setattr(trackers, "_is_installed", lambda package: True)
    check_trackers(True, "mine")
