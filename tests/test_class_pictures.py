"""Class pictures that the base draws: as many as are missing, always the same ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lora_sd.class_pictures import count_readable, draw_missing
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.errors import DataError


@pytest.fixture
def options(tmp_path: Path) -> FolderOptions:
    return FolderOptions(
        tmp_path / "class" / "fox",
        kind="regularisation",
        class_pictures=5,
        caption="a fox",
        trigger_word="sks",
        resolution_px=(21, 37),
    )


def draw(base, options, seed=3, **given):
    return draw_missing(base, options, 2, 2.0, seed, **given)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}


def test_a_missing_folder_is_filled_with_the_caption(base, options):
    assert draw(base, options) == 5
    found = read_folders([options]).pictures
    assert [picture.caption for picture in found] == ["a fox"] * 5
    assert len({picture.sha256 for picture in found}) == 5
    assert found[0].size_px == (32, 32)  # the largest resolution, in steps
    with Image.open(found[0].file) as image:
        settings = json.loads(image.text["lora_sd"])
    assert settings["prompt"] == "a fox" and settings["steps"] == 2
    assert draw(base, options) == 0


def test_a_stopped_run_goes_on_with_the_same_pictures(base, options, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_sd.generate.PIXELS_IN_A_BATCH", 2 * 32**2)
    told = []

    def stop(drawn: int, of: int) -> bool:
        told.append((drawn, of))
        return drawn >= 2

    assert draw(base, options, on_step=stop) == 2
    assert told == [(0, 5), (0, 5), (2, 5)]
    assert draw(base, options) == 3
    whole = replace(options, folder=tmp_path / "whole")
    assert draw(base, whole) == 5
    assert contents(options.folder) == contents(whole.folder)
    other = replace(options, folder=tmp_path / "other")
    draw(base, other, seed=4)
    same = set(contents(other.folder).values()) & set(contents(whole.folder).values())
    assert same == {b"a fox\n"}


def test_what_is_there_counts_if_it_can_be_read_and_stays(base, options):
    (options.folder / "inside").mkdir(parents=True)
    Image.new("RGB", (9, 9), "red").save(options.folder / "inside" / "mine.jpg", quality=95)
    (options.folder / "broken.png").write_bytes(b"no picture")
    (options.folder / "class-00002.png").write_bytes(b"no picture either")
    before = contents(options.folder / "inside")
    assert count_readable(options.folder) == 1
    assert draw(base, options) == 4
    assert count_readable(options.folder) == 5
    assert contents(options.folder / "inside") == before
    after = contents(options.folder)
    assert after["class-00002.png"] == b"no picture either"
    assert {"class-00001.png", "class-00003.png", "class-00005.png"} <= after.keys()


def test_drawn_pictures_have_their_caption_wherever_they_are_used(base, options):
    dressed = replace(
        options, caption="a fox\na {red|grey} fox", wildcards=True, caption_prefix="ink"
    )
    options.folder.mkdir(parents=True)
    (options.folder / "class-00002.txt").write_text("mine")
    draw(base, dressed)
    again = replace(options, class_pictures=0, caption=None, trigger_word=None, wildcards=True)
    captions = [picture.caption for picture in read_folders([again]).pictures]
    assert captions == [dressed.caption, "mine", *[dressed.caption] * 3]


def test_pictures_that_the_index_knows_are_not_decoded_again(base, options, tmp_path, monkeypatch):
    draw(base, options)
    index = tmp_path / "index.json"
    assert count_readable(options.folder, index) == 5
    monkeypatch.setattr("lora_sd.data.images.examine", lambda data: pytest.fail("decoded"))
    assert count_readable(options.folder, index) == 5


def test_what_cannot_be_drawn_is_a_sentence(base, options, tmp_path):
    with pytest.raises(DataError, match="has no caption to draw"):
        draw(base, replace(options, caption=" "))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        draw(base, replace(options, folder=tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be made"):
        draw(base, replace(options, folder=tmp_path / "file" / "inside"))
