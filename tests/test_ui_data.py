"""The Data set tab's handlers: what is shown, edited, uploaded, copied, deleted."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ui_fake_trainer import config, fake_trainer, state, wait_for  # noqa: F401

from lora_sd.errors import DataError
from lora_sd.ui.data import look, pictures
from lora_sd.ui.data.handlers import PAGE, DataHandlers
from lora_sd.ui.data.pictures import Cancelled
from lora_sd.ui.launch import Trainer
from lora_sd.ui.workplace import Workplace

EXAMPLE = "example/ink-icons"
NEVER = lambda done, of: False  # noqa: E731
ODD = ["../..", "/etc", None, 3, "mine/none", ["mine/cats"], {"id": "mine/cats"}, "x" * 10_000]


@pytest.fixture
def handlers(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataHandlers:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "fetched"))
    return DataHandlers(Workplace(trainer.outputs, tmp_path / "more", trainer))


@pytest.fixture
def cats(trainer: Trainer) -> Path:
    """A saved data set of three pictures: with a caption, with none, with a mask."""
    return fill(trainer.outputs / "datasets" / "cats", {"a": "a cat, red", "b": "", "c": "a dog"})


def fill(folder: Path, captions: dict[str, str], size: tuple[int, int] = (96, 64)) -> Path:
    folder.mkdir(parents=True)
    for number, (stem, caption) in enumerate(captions.items()):
        Image.effect_noise(size, 40 + number).save(folder / f"{stem}.png")
        if caption:
            (folder / f"{stem}.txt").write_text(f"{caption}\n")
    return folder


def captions(handlers: DataHandlers, data_set: str) -> dict[str, str]:
    shown = handlers.show(data_set, "tiny-sd")
    assert not shown.problems
    return {one.picture.name: one.picture.lines for one in shown.cards}


def save(handlers: DataHandlers, picture: object, before: object, caption: object) -> Any:
    return handlers.save("mine/cats", "tiny-sd", picture, before, caption)


def test_a_card_says_what_training_will_see(handlers: DataHandlers, cats: Path) -> None:
    Image.new("L", (96, 64), 255).save(cats / "c-mask.png")
    (cats / "b.txt").write_text(" ".join(["cat"] * 80))
    (cats / "broken.png").write_bytes(b"no picture")
    shown = handlers.show("mine/cats", "tiny-sd")
    card = {one.picture.name: one for one in shown.cards}
    assert list(card) == ["a.png", "b.png", "broken.png", "c.png"] and shown.editable
    assert card["a.png"].crops[0].size_px == (80, 48)
    assert card["a.png"].kept == pytest.approx(0.9)
    assert card["a.png"].tokens == 4 and card["a.png"].cut_at is None
    assert card["b.png"].caption[card["b.png"].cut_at :].split() == ["cat"] * 5
    assert card["broken.png"].problem and not card["broken.png"].crops
    assert card["c.png"].picture.has_mask and not card["a.png"].picture.has_mask
    assert (shown.total, shown.bare, shown.cut, shown.masks) == (4, 1, 1, 1)
    assert handlers.show("mine/cats", "sd15").cards[0].problem == ""  # shown at its own size


def test_pages_search_and_filters(handlers: DataHandlers, trainer: Trainer) -> None:
    many = {f"p{n:03}": "a cat" if n % 2 else "" for n in range(2 * PAGE + 5)}
    fill(trainer.outputs / "datasets" / "many", many, (16, 16))
    first = handlers.show("mine/many", "tiny-sd")
    assert (len(first.cards), first.page, first.pages) == (PAGE, 1, 3)
    last = handlers.show("mine/many", "tiny-sd", page=99)
    assert (len(last.cards), last.page) == (5, 3)
    for odd in (-5, None, "2", 1.5, True):
        assert handlers.show("mine/many", "tiny-sd", page=odd).page == 1
    found = handlers.show("mine/many", "tiny-sd", "CAT")
    assert found.found == PAGE + 2 and all(one.caption == "a cat" for one in found.cards)
    assert handlers.show("mine/many", "tiny-sd", "p001").found == 1
    assert handlers.show("mine/many", "tiny-sd", "", "bare").found == PAGE + 3
    assert handlers.show("mine/many", "tiny-sd", "", "cut").found == 0


def test_thumbnails_are_made_once(
    handlers: DataHandlers, cats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = handlers.show("mine/cats", "tiny-sd").cards
    monkeypatch.setattr(look, "read_image", lambda _: pytest.fail("decoded again"))
    assert handlers.show("mine/cats", "sd15").cards[0].small == first[0].small
    monkeypatch.undo()
    Image.new("RGB", (32, 32), "red").save(cats / "a.png")
    assert handlers.show("mine/cats", "tiny-sd").cards[0].small.size_px == (32, 32)


def test_a_caption_is_saved_cleared_and_undone(handlers: DataHandlers, cats: Path) -> None:
    saved = save(handlers, "b.png", "", "  a  bird \n\n of two lines ")
    assert not saved.problems and saved.card.picture.lines == "a bird\nof two lines"
    assert (cats / "b.txt").read_text() == "a bird\nof two lines\n"
    assert not save(handlers, "a.png", "a cat, red", "").problems
    assert not (cats / "a.txt").exists()
    shown = handlers.show("mine/cats", "tiny-sd")
    assert shown.undo == "caption of 'a.png'" and not shown.redo
    assert handlers.undo("mine/cats").said == "Taken back: caption of 'a.png'."
    assert captions(handlers, "mine/cats")["a.png"] == "a cat, red"
    handlers.undo("mine/cats")
    assert captions(handlers, "mine/cats")["b.png"] == ""
    assert handlers.undo("mine/cats").problems
    handlers.redo("mine/cats")
    assert captions(handlers, "mine/cats")["b.png"] == "a bird\nof two lines"


def test_what_another_page_wrote_is_not_lost(handlers: DataHandlers, cats: Path) -> None:
    save(handlers, "a.png", "a cat, red", "from the first page")
    second = save(handlers, "a.png", "a cat, red", "from the second page")
    assert second.conflict == "from the first page"
    assert captions(handlers, "mine/cats")["a.png"] == "from the first page"
    assert save(handlers, "a.png", second.conflict, "from the second page").conflict is None
    assert captions(handlers, "mine/cats")["a.png"] == "from the second page"


def test_captions_from_other_files_are_edited_too(handlers: DataHandlers, cats: Path) -> None:
    (cats / "c.txt").rename(cats / "c.TXT")
    (cats / "b.caption").write_text("an old one")
    (cats / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "by metadata"}\n')
    Image.new("RGB", (64, 64)).save(cats / "d.png")
    for name, before in (("b.png", "an old one"), ("c.png", "a dog"), ("d.png", "by metadata")):
        assert not save(handlers, name, before, f"new {name}").conflict
        assert captions(handlers, "mine/cats")[name] == f"new {name}"
    assert save(handlers, "b.png", "new b.png", "").card.picture.lines == ""
    assert save(handlers, "d.png", "new d.png", "").card.picture.lines == "by metadata"


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        *[(odd, "x") for odd in ("../a.png", "none.png", None, 3, ["a.png"], "a.txt", "a.png/")],
        *[("a.png", odd) for odd in (None, 3, ["x"], "\0", "\ud800", "x" * 5000)],
    ],
)
def test_only_captions_of_its_pictures_are_written(
    handlers: DataHandlers, cats: Path, picture: object, caption: object
) -> None:
    before = sorted((file.name, file.read_bytes()) for file in cats.iterdir())
    assert save(handlers, picture, "a cat, red", caption).problems
    assert sorted((file.name, file.read_bytes()) for file in cats.iterdir()) == before


def test_a_bulk_edit_does_what_was_shown(handlers: DataHandlers, cats: Path) -> None:
    form = {"kind": "prefix", "text": "sks,"}
    planned = handlers.preview("mine/cats", "tiny-sd", "", "all", form)
    assert planned.of == 3 and planned.changes[0] == ("a.png", "a cat, red", "sks, a cat, red")
    assert captions(handlers, "mine/cats")["a.png"] == "a cat, red"
    done = handlers.apply("mine/cats", "tiny-sd", "", "all", form)
    assert done.said == "3 captions changed"
    assert captions(handlers, "mine/cats") == {name: after for name, _, after in planned.changes}
    assert handlers.apply("mine/cats", "tiny-sd", "", "all", form).problems  # nothing is left
    handlers.undo("mine/cats")
    assert captions(handlers, "mine/cats")["b.png"] == ""
    found = handlers.preview("mine/cats", "tiny-sd", "dog", "all", form)
    assert [name for name, _, _ in found.changes] == ["c.png"] and found.of == 1


@pytest.mark.parametrize(
    "form",
    [
        {}, {"kind": "rm", "text": "x"}, {"kind": "prefix", "text": 3},
        {"kind": "prefix", "text": "x" * 1999}, {"kind": "replace", "text": "a", "by": ["x"]},
        {"kind": ["prefix"], "text": "x"},
    ],
)  # fmt: skip
def test_a_wrong_bulk_edit_changes_nothing(
    handlers: DataHandlers, cats: Path, form: dict[str, Any]
) -> None:
    before = captions(handlers, "mine/cats")
    assert handlers.preview("mine/cats", "tiny-sd", "", "all", form).problems
    assert handlers.apply("mine/cats", "tiny-sd", "", "all", form).problems
    assert captions(handlers, "mine/cats") == before


def test_a_picture_is_removed_with_all_that_belongs_to_it(
    handlers: DataHandlers, cats: Path
) -> None:
    Image.new("L", (96, 64), 255).save(cats / "a-mask.png")
    before = sorted(file.name for file in cats.iterdir())
    assert not handlers.remove("mine/cats", "a.png").problems
    assert not list(cats.glob("a*"))
    handlers.undo("mine/cats")
    assert sorted(file.name for file in cats.iterdir()) == before


def test_uploads_become_a_data_set_and_are_added(
    handlers: DataHandlers, trainer: Trainer, tmp_path: Path
) -> None:
    sent = fill(tmp_path / "sent", {"a": "one", "b": ""})
    Image.new("L", (96, 64), 255).save(sent / "a-mask.png")
    files = [str(file) for file in sorted(sent.iterdir())]
    made = handlers.upload(" fox ", files, NEVER)
    assert (made.data_set, made.problems) == ("mine/fox", [])
    assert captions(handlers, "mine/fox") == {"a.png": "one", "b.png": ""}
    added = handlers.add("mine/fox", files, NEVER)
    assert "'a.png' is kept as 'a-2.png'" in added.said
    kept = sorted(file.name for file in (trainer.outputs / "datasets" / "fox").iterdir())
    assert kept == [
        "a-2-mask.png", "a-2.png", "a-2.txt", "a-mask.png", "a.png", "a.txt", "b-2.png", "b.png",
    ]  # fmt: skip
    handlers.undo("mine/fox")
    assert list(captions(handlers, "mine/fox")) == ["a.png", "b.png"]
    assert handlers.upload("fox", files, NEVER).problems == [
        "There is a data set 'fox' already. Choose another name."
    ]
    assert handlers.upload("", files, NEVER).data_set == "mine/my-pictures"
    assert handlers.upload("", files, NEVER).data_set == "mine/my-pictures-2"


@pytest.mark.parametrize("name", ["../x", ".hidden", "a/b", "x" * 70, "con:", "\0"])
def test_data_sets_have_safe_names(handlers: DataHandlers, tmp_path: Path, name: str) -> None:
    files = [str(file) for file in fill(tmp_path / "sent", {"a": "one"}).iterdir()]
    assert "Name the data set" in handlers.upload(name, files, NEVER).problems[0]
    assert "Name the data set" in handlers.copy(EXAMPLE, name, NEVER).problems[0]


def test_what_is_cancelled_leaves_nothing(
    handlers: DataHandlers, trainer: Trainer, tmp_path: Path
) -> None:
    files = [str(file) for file in fill(tmp_path / "sent", {"a": "one", "b": ""}).iterdir()]
    for done in (
        handlers.upload("fox", files, lambda done, of: done == 1),
        handlers.copy(EXAMPLE, "copy", lambda done, of: done == 5),
    ):
        assert done.data_set is None and done.said.startswith("Cancelled")
    assert not any((trainer.outputs / "datasets").glob("*"))


def test_a_copy_trains_as_its_original(
    handlers: DataHandlers, trainer: Trainer, tmp_path: Path
) -> None:
    inside = fill(tmp_path / "more" / "10_sks cat", {"a": "one", "b": ""})
    (inside / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "by metadata"}\n')
    fill(inside / "5_deep", {"c": ""})
    Image.new("L", (96, 64), 255).save(inside / "a-mask.png")
    assert handlers.copy("more/10_sks cat", "", NEVER).data_set == "mine/10_sks-cat"
    copied = trainer.outputs / "datasets" / "10_sks-cat" / "10_sks cat"
    assert pictures.captioned(copied) == [
        (copied / name, caption)
        for name, caption in (("5_deep/c.png", "deep"), ("a.png", "one"), ("b.png", "by metadata"))
    ]
    assert pictures.mask_count(copied) == 1


def test_example_and_other_folders_are_never_changed(
    handlers: DataHandlers, tmp_path: Path
) -> None:
    fill(tmp_path / "more" / "cats", {"a": "one"})
    for data_set in (EXAMPLE, "more/cats"):
        shown = handlers.show(data_set, "tiny-sd")
        name, before = shown.cards[0].picture.name, shown.cards[0].picture.lines
        assert not shown.editable
        assert handlers.save(data_set, "tiny-sd", name, before, "x").problems
        form = {"kind": "prefix", "text": "x"}
        assert handlers.apply(data_set, "tiny-sd", "", "all", form).problems
        for act in (handlers.undo, handlers.redo, handlers.delete):
            assert act(data_set).problems
        assert handlers.remove(data_set, name).problems
        assert handlers.add(data_set, [], NEVER).problems
        assert handlers.show(data_set, "tiny-sd").cards[0].picture.lines == before


def test_a_deleted_data_set_comes_back_with_its_changes(
    handlers: DataHandlers, cats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(handlers, "b.png", "", "a bird")
    gone = handlers.delete("mine/cats")
    assert gone.data_set == EXAMPLE and not cats.exists()
    fill(cats, {"z": "another of that name"})
    (deleted,) = handlers.deleted()
    assert handlers.show("mine/cats", "tiny-sd").undo == ""
    assert handlers.bring_back(deleted.id).problems  # the name is taken
    handlers.delete("mine/cats")
    assert handlers.bring_back(deleted.id).data_set == "mine/cats"
    assert captions(handlers, "mine/cats")["b.png"] == "a bird"
    handlers.undo("mine/cats")
    assert captions(handlers, "mine/cats")["b.png"] == ""
    for odd in ("../cats", None, 3, deleted.id):
        assert handlers.bring_back(odd).problems
    monkeypatch.setattr("lora_sd.ui.data.saved.KEPT_S", 0.0)
    handlers.delete("mine/cats")
    assert [one.name for one in handlers.deleted()] == ["cats"]  # the one before is gone


def test_pictures_stay_while_a_run_works_with_them(
    handlers: DataHandlers, cats: Path, trainer: Trainer
) -> None:
    handlers.remove("mine/cats", "a.png")
    wanted = config(trainer.outputs)
    wanted.data.folder = str(cats)
    trainer.start(wanted)
    wait_for(lambda: state(trainer) == "Training")
    for done in (
        handlers.remove("mine/cats", "b.png"),
        handlers.undo("mine/cats"),
        handlers.delete("mine/cats"),
    ):
        assert "The run 'run' works with this data set" in done.problems[0]
    assert not save(handlers, "b.png", "", "captions were read when it began").problems
    trainer.stop("run")
    wait_for(lambda: trainer.current() is None)
    assert not handlers.delete("mine/cats").problems


@pytest.mark.parametrize("data_set", ODD)
def test_only_offered_data_sets_are_touched(handlers: DataHandlers, data_set: object) -> None:
    said = [
        handlers.show(data_set, "tiny-sd").problems,
        handlers.save(data_set, "tiny-sd", "a.png", "", "x").problems,
        handlers.remove(data_set, "a.png").problems,
        handlers.preview(data_set, "tiny-sd", "", "all", {}).problems,
        handlers.apply(data_set, "tiny-sd", "", "all", {}).problems,
        handlers.undo(data_set).problems,
        handlers.add(data_set, [], NEVER).problems,
        handlers.copy(data_set, "x", NEVER).problems,
        handlers.delete(data_set).problems,
        handlers.check(data_set, "tiny-sd", NEVER).problems,
    ]
    assert all(said) and "/" not in str(said)
    with pytest.raises(DataError):
        handlers.look_at(data_set, "tiny-sd", "a.png")


def test_a_check_tells_in_the_page_s_words_and_can_be_cancelled(
    handlers: DataHandlers, cats: Path, tmp_path: Path
) -> None:
    checked = handlers.check(EXAMPLE, "tiny-sd", NEVER)
    assert not checked.problems and checked.html.count("<image ") == 24
    assert checked.file and checked.file.name == "ink-icons-pictures.html"
    assert checked.file.read_text(encoding="utf-8").startswith("<!doctype html>")
    (cats / "c.txt").write_text("<b>a wall</b>")
    small = handlers.check("mine/cats", "sdxl", NEVER)
    assert "1 of 3 pictures in &#x27;cats&#x27; has no caption" in small.html
    assert "data.resolution_px" not in small.html and str(tmp_path) not in small.html
    assert small.file and "&lt;b&gt;a wall&lt;/b&gt;" in small.file.read_text()
    assert str(tmp_path) not in small.file.read_text()
    stopped = handlers.check(EXAMPLE, "tiny-sd", lambda done, of: done == 3)
    assert stopped.html == "" and stopped.file is None and not stopped.problems


def test_looking_through_uploads_can_be_cancelled(tmp_path: Path) -> None:
    files = sorted(fill(tmp_path / "sent", {"a": "one", "b": ""}).iterdir())
    with pytest.raises(Cancelled):
        pictures.match_uploads(files, lambda done, of: True)
