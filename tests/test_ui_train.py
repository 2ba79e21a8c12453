"""The Train tab: its handlers, and what it shows of a run."""

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ui_fake_trainer import fake_trainer, state, wait_for  # noqa: F401

from lora_sd.errors import DataError
from lora_sd.ui import fields
from lora_sd.ui.data import pictures
from lora_sd.ui.launch import Trainer
from lora_sd.ui.train.handlers import EXAMPLE, TrainHandlers
from lora_sd.ui.workplace import Workplace


@pytest.fixture
def handlers(trainer: Trainer) -> TrainHandlers:
    return TrainHandlers(Workplace(trainer.outputs, None, trainer))


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
        "fox.png", "fox.txt", "my owl.png", "my owl.txt",
    ]  # fmt: skip
    assert (saved / "fox.txt").read_text() == "a red fox\n"
    assert (saved / "my owl.txt").read_text() == "an\nowl\n"
    assert "mine/forest" in [one.id for one in handlers.folders()]
    wait_for(lambda: handlers.trainer.current() is None)
    again = handlers.start(form(handlers), "upload", None, sent)
    assert again.problems == ["There is a data set 'forest' already. Choose another name."]


def saved_upload(handlers: TrainHandlers, folder: Path, name: str = "forest") -> Path:
    uploads = pictures.match_uploads(sorted(folder.iterdir()))
    return pictures.save_folder(handlers.outputs, name, uploads).path


def test_uploaded_masks_stay_with_their_pictures(handlers: TrainHandlers, tmp_path: Path) -> None:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    for name in ("my fox.png", "my fox-mask.png", "own-mask.png"):
        Image.new("L", (80, 64), len(name)).save(folder / name)
    (folder / "my fox.caption").write_text("a fox")
    saved = saved_upload(handlers, folder)
    assert sorted(file.name for file in saved.iterdir()) == [
        "my fox-mask.png", "my fox.png", "my fox.txt", "own-mask.png",
    ]  # fmt: skip
    assert [(file.name, caption) for file, caption in pictures.captioned(saved)] == [
        ("my fox.png", "a fox"),
        ("own-mask.png", ""),
    ]
    with Image.open(saved / "my fox-mask.png") as mask:
        assert mask.getpixel((0, 0)) == len("my fox-mask.png")


def test_no_uploaded_picture_becomes_the_mask_of_another(
    handlers: TrainHandlers, tmp_path: Path
) -> None:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    for name in ("fox.png", "fox mask.png", "fox (mask).png"):
        Image.new("RGB", (80, 64)).save(folder / name)
    saved = saved_upload(handlers, folder)
    assert {file.name for file, _ in pictures.captioned(saved)} == {
        file.name for file in folder.iterdir()
    }


def test_uploads_are_paired_as_training_pairs_them(handlers: TrainHandlers, tmp_path: Path) -> None:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    for name in ("u\u0308bung.png", "owl.png"):  # a letter with its dots beside it
        Image.new("RGB", (80, 64)).save(folder / name)
    (folder / "\u00fcbung.txt").write_text("{a fox\n|an owl}\n\nin  ink\n")
    (folder / "metadata.jsonl").write_text('{"file_name": "owl.png", "text": "an owl"}\n')
    saved = saved_upload(handlers, folder)
    assert [caption for _, caption in pictures.captioned(saved)] == [
        "an owl",
        "{a fox |an owl} in ink",
    ]
    assert (saved / "u\u0308bung.txt").read_text() == "{a fox\n|an owl}\nin ink\n"


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """A folder of folders of pictures, in the ways that people keep them."""
    root = tmp_path / "more"
    for name in ("cats/10_sks cat/a.png", "cats/10_sks cat/b.png", "cats/c.png", "flat/d.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 20)).save(root / name)
    (root / "cats" / "10_sks cat" / "a.caption").write_text("a cat")
    (root / "flat" / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "a dog"}\n')
    (root / "flat" / "broken.png").write_bytes(b"no picture")
    (root / "flat" / "d-mask.png").write_bytes(b"")
    (root / "empty" / "deep").mkdir(parents=True)
    return root


def test_folders_are_listed_and_captioned_as_training_reads_them(
    handlers: TrainHandlers, more: Path
) -> None:
    handlers.more_pictures = more
    offered = {one.id: one.label for one in handlers.folders()}
    assert offered["more/cats"] == "cats (3 pictures)"
    assert offered["more/flat"] == "flat (2 pictures)" and "more/empty" not in offered
    assert offered["example/ink-icons"].startswith("Example: ink-icons (")
    shown = handlers.show_folder("more/cats")
    assert {file.name: caption for file, caption in shown.pairs} == {
        "a.png": "a cat", "b.png": "sks cat", "c.png": "",
    }  # fmt: skip
    assert shown.lacks_captions
    assert {f.name: c for f, c in handlers.show_folder("more/flat").pairs}["d.png"] == "a dog"


def test_a_list_of_folders_decodes_nothing(
    handlers: TrainHandlers, more: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers.more_pictures = more
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    assert len(handlers.folders()) >= 3 and handlers.show_folder("more/cats").pairs


def test_a_preview_keeps_the_shape(more: Path) -> None:
    Image.new("RGB", (600, 200)).save(more / "wide.png")
    small = pictures.preview(more / "wide.png")
    assert small and small.size == (pictures.PREVIEW_PX, round(pictures.PREVIEW_PX / 3))
    assert pictures.preview(more / "flat" / "broken.png") is None


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
    for name in ("a.png", "a.jpg", "again/b.png", "b.png", ".hidden.png", "c.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)
    for name in ("broken.png", "notes.pdf", "lonely.txt", "moving.gif"):
        (folder / name).write_text("text")
    (folder / "c.txt").write_text(" ")
    with pytest.raises(DataError) as caught:
        pictures.match_uploads(sorted(file for file in folder.rglob("*") if file.is_file()))
    said = caught.value.problems
    assert len(said) == 9
    for name in (
        "a.png", "a.jpg", "b.png", ".hidden.png", "c.png", "broken.png", "notes.pdf", "lonely.txt",
        "moving.gif",
    ):  # fmt: skip
        assert sum(f"'{name}'" in sentence for sentence in said) == 1, name
    assert not any("/" in sentence for sentence in said)
    assert any("nor a caption (.txt, .caption, metadata.jsonl, metadata.csv)" in s for s in said)


def test_a_caption_that_cannot_be_read_comes_with_what_to_do(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="latin.txt.*: save it as UTF-8"):
        pictures.match_uploads(sorted(tmp_path.iterdir()))


def test_the_layers_shown_are_those_that_training_adapts(handlers: TrainHandlers) -> None:
    def text_layers(**changes: Any) -> int:
        shown = handlers.layers(form(handlers, **changes))
        assert not shown.problems
        found = re.findall(r"(\d+) x text_encoder", shown.table)
        return sum(map(int, found))

    assert text_layers() == 0
    both = text_layers(adapter__text_encoder=True)
    assert text_layers(adapter__text_encoder=True, base__clip_skip=2) == both / 2 > 0


def test_prompts_fit_the_pictures(handlers: TrainHandlers, more: Path) -> None:
    handlers.more_pictures = more

    def prompts(folder: object, trigger: str = "", common: str = "") -> str | None:
        return handlers.fitting_prompts("folder", folder, None, trigger, common)

    example = prompts(EXAMPLE, "myfox")
    assert example and example.splitlines() == handlers.starting_config().sample.prompts
    assert prompts("more/cats") == "a cat\nsks cat"
    assert prompts("more/cats", "mycat") == "mycat, a cat\nmycat, sks cat"
    (more / "bare").mkdir()
    Image.new("RGB", (60, 20)).save(more / "bare" / "a.png")
    assert prompts("more/bare") == ""
    assert prompts("more/bare", "mycat", "a photo") == "mycat, a photo"
    assert prompts("more/none") is prompts(None) is prompts(["x"]) is None

    table = [["a.png", ""], ["b.png", "two\nlines"], ["c.png", "two lines"], ["d.png", "a dog"]]
    assert handlers.fitting_prompts("upload", EXAMPLE, table, None, None) == "two lines\na dog"
    assert handlers.fitting_prompts("upload", EXAMPLE, [["", ""]], None, None) is None


def test_masks_that_are_not_used_are_told(handlers: TrainHandlers, more: Path) -> None:
    handlers.more_pictures = more
    Image.new("L", (60, 20)).save(more / "flat" / "d-mask.png")
    assert handlers.show_folder("more/flat").masks == 1
    assert handlers.show_folder("more/cats").masks == 0
    files = [str(more / "flat" / name) for name in ("d.png", "d-mask.png")]
    assert handlers.show_upload(files).masks == 1
    assert "1 mask file is not used" in pictures.mask_sentence(1, "off")
    assert "2 mask files are not used" in pictures.mask_sentence(2, "alpha")
    assert pictures.mask_sentence(0, "off") == pictures.mask_sentence(1, "file") == ""
