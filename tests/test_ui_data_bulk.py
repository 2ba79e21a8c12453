"""Captions changed many at a time, and their tags counted."""

import pytest

from lora_sd.ui.data.bulk import BulkEdit, BulkKind, tag_counts


@pytest.mark.parametrize(
    ("kind", "text", "by", "before", "after"),
    [
        ("prefix", "sks,", "", "a cat", "sks, a cat"),
        ("prefix", "sks,", "", "sks, a cat", "sks, a cat"),
        ("prefix", "sks", "", "", "sks"),
        ("suffix", ", ink", "", "a cat", "a cat, ink"),
        ("suffix", "in ink", "", "a cat in ink", "a cat in ink"),
        ("replace", "cat", "dog", "a cat, cat food", "a dog, dog food"),
        ("replace", "a cat", "", "a cat", ""),
        ("replace", "Cat", "dog", "a cat", "a cat"),
        ("remove_tag", "Red", "", "cat,red , red hat", "cat, red hat"),
        ("remove_tag", "blue", "", "cat,red", "cat,red"),
        ("remove_tag", "cat", "", "cat", ""),
        ("prefix", "sks,", "", "a cat\na pet", "sks, a cat\nsks, a pet"),
    ],
)
def test_each_edit(kind: BulkKind, text: str, by: str, before: str, after: str) -> None:
    assert BulkEdit(kind, text, by).of(before) == after
    again = BulkEdit(kind, text, by).of(after)
    assert again == after, "an edit done twice changes no more"


def test_tags_are_counted_once_a_caption() -> None:
    captions = ["cat, red", "cat, cat, blue", "a sentence of a cat", ""]
    assert tag_counts(captions) == [("cat", 2), ("blue", 1), ("red", 1)]
