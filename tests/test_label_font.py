"""The font of the words on a picture."""

import pytest
from PIL import ImageFont

from lora_sd import label_font as fonts
from lora_sd.label_font import label_font, lacking, readable


def test_letters_that_a_font_lacks_are_found():
    assert lacking(ImageFont.load_default(14), "fox, 1: \u72d0\u72f8") == {"\u72d0", "\u72f8"}


def test_pillows_own_font_is_taken_where_it_suffices():
    assert label_font(["a fox", "scale 0.5"], 14).getname() == ImageFont.load_default(14).getname()


def test_a_font_of_the_system_that_has_more_of_the_letters_is_taken(monkeypatch):
    def only_one(font, size_px):
        if font != "wqy-zenhei.ttc":
            raise OSError
        return "has all"

    monkeypatch.setattr(fonts, "_of_the_system", only_one)
    monkeypatch.setattr(
        fonts, "lacking", lambda font, letters: set() if font == "has all" else set(letters)
    )
    assert label_font(["\u72d0"], 14) == "has all"


@pytest.mark.parametrize(
    ("label", "otherwise", "shown"),
    [
        ("a fox", "row 1", "a fox"),
        ("\u72d0, 1", "row 1", "row 1"),
        ("\u5f3a\u5ea6 0.5", "", "0.5"),
    ],
)
def test_boxes_are_never_written(label, otherwise, shown):
    assert readable(label, ImageFont.load_default(14), otherwise) == shown
