"""Uploaded pictures with their captions and masks."""

import io
from pathlib import Path

import pytest
from PIL import Image

from lora_sd.data.report.measures import THUMBNAIL_PX
from lora_sd.errors import DataError
from lora_sd.ui.data import pictures
from lora_sd.ui.data.look import small


def test_masks_and_captions_stay_with_their_pictures(tmp_path: Path) -> None:
    for name in ("my fox.png", "my fox-mask.png", "own-mask.png"):
        Image.new("L", (80, 64)).save(tmp_path / name)
    (tmp_path / "my fox.caption").write_text("a fox")
    uploads = pictures.match_uploads(sorted(tmp_path.iterdir()))
    assert [(one.file.name, one.caption, one.mask and one.mask.name) for one in uploads] == [
        ("my fox.png", "a fox", "my fox-mask.png"),
        ("own-mask.png", "", None),
    ]


def test_uploads_are_paired_as_training_pairs_them(tmp_path: Path) -> None:
    for name in ("u\u0308bung.png", "owl.png"):  # a letter with its dots beside it
        Image.new("RGB", (80, 64)).save(tmp_path / name)
    (tmp_path / "\u00fcbung.txt").write_text("{a fox\n|an owl}\n\nin  ink\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "owl.png", "text": "an owl"}\n')
    uploads = pictures.match_uploads(sorted(tmp_path.iterdir()))
    captions = {one.file.name: one.caption for one in uploads}
    assert captions["owl.png"] == "an owl"
    assert captions["u\u0308bung.png"].split() == ["{a", "fox", "|an", "owl}", "in", "ink"]


def test_a_preview_keeps_the_shape(tmp_path: Path) -> None:
    Image.new("RGB", (600, 200)).save(tmp_path / "wide.png")
    found = small(tmp_path / "wide.png")
    shown = Image.open(io.BytesIO(found.jpeg))
    assert found.size_px == (600, 200)
    assert shown.size == (THUMBNAIL_PX, round(THUMBNAIL_PX / 3))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert not small(tmp_path / "broken.png").jpeg


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
