"""The data report in the Train tab."""

import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ui_fake_trainer import fake_trainer, state, wait_for  # noqa: F401

from lora_sd.ui import fields
from lora_sd.ui.data.report import SAID_ABOVE, check_pictures
from lora_sd.ui.launch import Trainer
from lora_sd.ui.train.handlers import TrainHandlers
from lora_sd.ui.workplace import Workplace


@pytest.fixture
def handlers(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainHandlers:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "fetched"))
    return TrainHandlers(Workplace(trainer.outputs, tmp_path / "more", trainer))


def form(handlers: TrainHandlers, **changes: Any) -> dict[str, Any]:
    values = fields.form_values(handlers.starting_config(), fields.FIELDS)
    shown = {name: fields.component(name, values[name]).value for name in fields.FIELDS}
    return shown | {name.replace("__", "."): value for name, value in changes.items()}


def test_a_chosen_folder_is_checked(handlers: TrainHandlers) -> None:
    checked = check_pictures(handlers, form(handlers), "folder", "example/ink-icons", {})
    assert checked.problems == [] and checked.html.count("<image ") == 24
    assert checked.file and checked.file.name == "ink-icons-pictures.html"
    assert checked.file.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    "folder_id", ["../..", "/etc", None, 3, "more/none", ["example/ink-icons"]]
)
def test_only_offered_folders_are_checked(handlers: TrainHandlers, folder_id: object) -> None:
    checked = check_pictures(handlers, form(handlers), "folder", folder_id, {})
    assert checked.html == "" and checked.file is None
    assert checked.problems == ["Choose a folder of pictures, or upload some."]


def test_uploads_are_checked_with_the_captions_on_the_page_and_not_kept(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    files = []
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
        files.append(str(tmp_path / name))
    captions = [["a.png", "<b>a wall</b>"], ["b.png", "a sea"]]
    upload = {"files": files, "captions": captions}
    checked = check_pictures(handlers, form(handlers), "upload", None, upload)
    assert checked.problems == [] and checked.html.count("<image ") == 2
    assert checked.file and "&lt;b&gt;a wall&lt;/b&gt;" in checked.file.read_text()
    left = [path for path in (tmp_path / "fetched").rglob("*") if path.is_file()]
    assert left == [checked.file]


def test_problems_are_sentences_in_the_page_s_words(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    wrong = check_pictures(
        handlers, form(handlers, train__batch_size="many"), "folder", "example/ink-icons", {}
    )
    assert wrong.html == "" and "'Batch size'" in wrong.problems[0]
    fill = tmp_path / "more" / "small"
    fill.mkdir(parents=True)
    for number in range(3):
        Image.effect_noise((32, 32), 50 + number).save(fill / f"{number}.png")
        (fill / f"{number}.txt").write_text("noise")
    small = check_pictures(handlers, form(handlers), "folder", "more/small", {})
    assert re.search("a lower [^.]*Resolution", small.html), small.html[:2000]
    assert "data.resolution_px" not in small.html


def test_what_is_said_beside_the_uploads_is_not_said_twice(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    files = [str(tmp_path / "broken.png")]
    assert "'broken.png'" in handlers.show_upload(files).problems[0]
    checked = check_pictures(handlers, form(handlers), "upload", None, {"files": files})
    assert checked.problems == [SAID_ABOVE]
    none = check_pictures(handlers, form(handlers), "upload", None, {"files": None})
    assert none.problems == ["Upload some pictures, or use a folder."]


def test_what_the_terminal_also_says_is_in_the_panel(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    files = []
    for name in ("a.png", "a-mask.png", "bare.png"):
        Image.effect_noise((64, 64), 50 + len(name)).save(tmp_path / name)
        files.append(str(tmp_path / name))
    upload = {"files": files, "captions": [["a.png", "a wall"]]}
    checked = check_pictures(handlers, form(handlers), "upload", None, upload)
    html = unescape(checked.html)
    assert "'uploaded': Mask files, not used as 'Masks' is 'off': 1 ('a-mask.png')." in html
    assert "bare.png</b> has no caption." in html
    assert "write one into 'Caption for pictures that have none', above" in html
    captioned = {"files": files[:1], "captions": [["a.png", "a wall"]]}
    again = check_pictures(handlers, form(handlers), "upload", None, captioned)
    assert "pictures that have no caption" not in again.html and "Also" not in again.html
