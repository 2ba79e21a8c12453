"""The Train tab: its handlers, and what it shows of a run."""

import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ui_fake_trainer import fake_trainer, state, wait_for  # noqa: F401

from lora_sd.errors import DataError
from lora_sd.run_folder import RunFolder, Status
from lora_sd.ui import fields, pictures
from lora_sd.ui.launch import Trainer
from lora_sd.ui.loss_curve import loss_curve
from lora_sd.ui.run_panel import changes
from lora_sd.ui.run_view import card_html, duration, read_run
from lora_sd.ui.train_handlers import TrainHandlers


def test_loss_curve_ends_at_the_last_step_and_skips_what_is_no_number() -> None:
    html = loss_curve([(1, 1.0), (2, math.nan), (3, 0.5)], 6)
    assert "at step 3" in html and "nan" not in html
    assert 'style="left:50.0%' in html
    assert loss_curve([], 10) == ""
    assert html.count("<polyline") == 2


def test_a_long_curve_stays_small() -> None:
    assert len(loss_curve([(n, 1 / n) for n in range(1, 100_000)], 100_000)) < 20_000


def test_card_escapes_what_a_run_says(trainer: Trainer) -> None:
    run = RunFolder(trainer.outputs / "run")
    run.path.mkdir(parents=True)
    run.write_status(Status("failed", 3, 10, "<img src=x onerror=alert(1)>"))
    assert "<img" not in card_html(read_run(trainer, "run"))


def test_only_changes_are_sent_and_half_written_pictures_wait(handlers: TrainHandlers) -> None:
    run = RunFolder(handlers.outputs / "run")
    run.samples.mkdir(parents=True)
    run.config_file.write_text("{}")
    run.write_status(Status("sampling", 3, 10))
    sample = run.sample_file(3, 0)
    Image.effect_noise((64, 64), 90).save(sample)
    whole = sample.read_bytes()
    for file in (sample, run.grid_file):
        file.write_bytes(whole[: len(whole) // 2])
    updates, shown = changes(handlers, handlers.look(None), {})
    assert {"card", "stop"} <= updates.keys() and not {"samples", "grid"} & updates.keys()
    for file in (sample, run.grid_file):
        file.write_bytes(whole)
    updates, shown = changes(handlers, handlers.look(None), shown)
    assert updates.keys() == {"samples", "grid"}
    assert changes(handlers, handlers.look(None), shown)[0] == {}


def test_durations() -> None:
    assert [duration(s) for s in (5, 65, 900, 7500)] == ["5 s", "1 min 5 s", "15 min", "2 h 5 min"]


@pytest.fixture
def handlers(trainer: Trainer) -> TrainHandlers:
    return TrainHandlers(trainer.outputs, None, trainer)


def form(handlers: TrainHandlers, **changes: Any) -> dict[str, Any]:
    start = handlers.starting_config()
    values = fields.form_values(start, fields.FIELDS)
    shown = {name: fields.component(name, values[name]).value for name in fields.FIELDS}
    return shown | {name.replace("__", "."): value for name, value in changes.items()}


def test_start_trains_the_example(handlers: TrainHandlers) -> None:
    started = handlers.start(form(handlers, train__steps=2), "folder", "example/ink-icons", {})
    assert started.problems == [] and started.run == "ink-icons"
    wait_for(lambda: state(handlers.trainer, "ink-icons") == "Finished")
    assert handlers.run_names() == ["ink-icons"]
    view = handlers.look(None)
    assert view and view.name == "ink-icons"


@pytest.mark.parametrize("folder", ["../..", "/etc", "example/../..", None, ["example"], 3])
def test_only_offered_folders_are_read(handlers: TrainHandlers, folder: Any) -> None:
    started = handlers.start(form(handlers), "folder", folder, {})
    assert started.run is None
    assert started.problems == ["Choose a folder of pictures, or upload some."]
    assert handlers.show_folder(folder).pairs == []


def test_all_problems_come_at_once_and_nothing_is_started(handlers: TrainHandlers) -> None:
    wrong = form(handlers, train__steps=0, adapter__rank=-1)
    started = handlers.start(wrong, "folder", "nowhere", {})
    assert started.run is None and len(started.problems) == 3
    assert handlers.trainer.current() is None and not handlers.outputs.exists()


def test_folders_of_runs_and_pictures_are_not_the_browsers_to_choose(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    sent = form(handlers, output__folder=str(tmp_path / "elsewhere"), data__folder="/etc")
    handlers.start(sent | {"train.steps": 1}, "folder", "example/ink-icons", {})
    text = (handlers.outputs / ".app" / "ink-icons.yaml").read_text()
    assert "elsewhere" not in text and "/etc" not in text
    wait_for(lambda: handlers.trainer.current() is None)


def upload(tmp_path: Path) -> list[str]:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    for name in ("fox.png", "my owl.png"):
        Image.new("RGB", (80, 64), "orange").save(folder / name)
    (folder / "fox.txt").write_text("a fox\n")
    return [str(file) for file in sorted(folder.iterdir())]


def test_uploads_become_a_data_set_with_the_captions_of_the_table(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    files = upload(tmp_path)
    shown = handlers.show_upload(files)
    assert [(file.name, caption) for file, caption in shown.pairs] == [
        ("fox.png", "a fox"),
        ("my owl.png", ""),
    ]
    table = [["fox.png", "a red fox"], ["my owl.png", "an\nowl"], ["../x", "y"]]
    sent = {"name": "forest", "files": files, "captions": table}
    started = handlers.start(form(handlers, train__steps=1), "upload", None, sent)
    assert started.problems == [] and started.run == "forest"
    saved = handlers.outputs / "datasets" / "forest"
    assert sorted(file.name for file in saved.iterdir()) == [
        "fox.png", "fox.txt", "my-owl.png", "my-owl.txt",
    ]  # fmt: skip
    assert (saved / "fox.txt").read_text() == "a red fox\n"
    assert (saved / "my-owl.txt").read_text() == "an owl\n"
    assert "mine/forest" in [one.id for one in handlers.folders()]
    wait_for(lambda: handlers.trainer.current() is None)
    again = handlers.start(form(handlers), "upload", None, sent)
    assert again.problems == ["There is a data set 'forest' already. Choose another name."]


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 70, None])
def test_data_sets_have_safe_names(handlers: TrainHandlers, tmp_path: Path, name: Any) -> None:
    sent = {"name": name, "files": upload(tmp_path), "captions": None}
    started = handlers.start(form(handlers), "upload", None, sent)
    assert started.run is None and "Name the data set" in " ".join(started.problems)
    assert not (handlers.outputs / "datasets").exists() or not any(
        (handlers.outputs / "datasets").iterdir()
    )


def test_bad_uploads_are_named_all_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "u"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    for name in ("broken.png", "notes.pdf", "lonely.txt"):
        (folder / name).write_text("text")
    with pytest.raises(DataError) as caught:
        pictures.match_uploads(sorted(folder.iterdir()))
    said = " ".join(caught.value.problems)
    assert all(word in said for word in ("'a'", "'broken.png'", "'notes.pdf'", "'lonely.txt'"))


@pytest.mark.parametrize("run", ["../run", "", None, 3, "no-such-run"])
def test_stop_and_resume_take_only_names_of_runs(handlers: TrainHandlers, run: Any) -> None:
    assert handlers.stop(run) and handlers.resume(run)
