"""What becomes of a caption each time it is shown."""

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from lora_sd.data.captions import draw_caption, plain_caption, varies
from lora_sd.data.folder_options import FolderOptions

TAG = some.text("abcxyz", min_size=1, max_size=4)
SEEDS = some.integers(0, 1000)
OPTIONS = some.builds(
    FolderOptions,
    folder=some.just(Path("cats")),
    shuffle_tags=some.booleans(),
    keep_tags=some.integers(0, 3),
    tag_dropout=some.sampled_from([0.0, 0.3, 0.9]),
    wildcards=some.booleans(),
    trigger_word=some.sampled_from([None, "", "sks", "sks cat"]),
    caption_prefix=some.sampled_from(["", "ink drawing,", " two words "]),
    caption_suffix=some.sampled_from(["", "on paper"]),
)
CAPTION = some.text("abc,|{} \n1", max_size=40)


def options(**given: Any) -> FolderOptions:
    return FolderOptions(Path("cats"), **given)


def drawn(caption: str, given: FolderOptions, draws: int = 200) -> Counter[str]:
    return Counter(draw_caption(caption, given, Random(seed)) for seed in range(draws))


def tags(caption: str) -> list[str]:
    return [tag.strip() for tag in caption.split(",")]


@given(caption=CAPTION, options=OPTIONS, seed=SEEDS)
def test_a_caption_is_one_line_and_a_function_of_the_seed(caption, options, seed):
    first = draw_caption(caption, options, Random(seed))
    assert first == draw_caption(caption, options, Random(seed))
    assert first == " ".join(first.split())
    assert "\n" not in plain_caption(caption, options)


@given(caption=CAPTION, options=OPTIONS, seed=SEEDS)
def test_what_does_not_vary_is_always_the_plain_caption(caption, options, seed):
    if not varies(caption, options):
        assert draw_caption(caption, options, Random(seed)) == plain_caption(caption, options)


@pytest.mark.parametrize(
    ("caption", "given"),
    [
        ("{a|b} cat", {"wildcards": True}),
        ("a cat\na dog", {"wildcards": True}),
        ("a, b, c", {"shuffle_tags": True}),
        ("a, b", {"tag_dropout": 0.5}),
        ("a ||| b, c", {"shuffle_tags": True, "keep_tags": 9}),
    ],
)
def test_what_varies_gives_several_captions_the_plain_one_among_them(caption, given):
    found = drawn(caption, options(**given))
    assert varies(caption, options(**given)) and len(found) > 1
    assert plain_caption(caption, options(**given)) in found


@pytest.mark.parametrize(
    ("caption", "given"),
    [
        ("{a|b} cat", {}),
        ("a cat, b", {}),
        ("{a} cat", {"wildcards": True}),
        ("a, b", {"shuffle_tags": True, "keep_tags": 1}),
        ("a, b", {"tag_dropout": 0.5, "keep_tags": 2}),
        ("a, a", {"shuffle_tags": True}),
        ("a, b ||| c ||| d", {"shuffle_tags": True}),
    ],
)
def test_what_cannot_vary_says_so(caption, given):
    assert not varies(caption, options(**given)) and len(drawn(caption, options(**given))) == 1


@given(some.lists(TAG, min_size=1, max_size=6), some.integers(0, 7), SEEDS)
def test_shuffling_keeps_every_tag_and_the_first_ones_in_place(written, keep, seed):
    given = options(shuffle_tags=True, keep_tags=keep)
    shown = tags(draw_caption(",".join(written), given, Random(seed)))
    assert Counter(shown) == Counter(written)
    assert shown[:keep] == written[:keep]


@given(some.lists(TAG, max_size=3), some.lists(TAG, max_size=4), some.lists(TAG, max_size=3), SEEDS)
def test_separators_part_what_stays_and_vanish(front, free, end, seed):
    caption = "|||".join(", ".join(part) for part in (front, free, end))
    assert draw_caption(caption, options(), Random(seed)) == ", ".join(front + free + end)
    given = options(shuffle_tags=True, tag_dropout=0.5)
    shown = tags(draw_caption(caption, given, Random(seed)))
    shown = [tag for tag in shown if tag]
    assert shown[: len(front)] == front and shown[len(shown) - len(end) :] == end
    assert not Counter(shown) - Counter(front + free + end)


def test_tags_are_dropped_as_often_as_asked_and_kept_ones_never():
    found = drawn("keep, a, b, c, d", options(keep_tags=1, tag_dropout=0.25), 2000)
    count = Counter(tag for caption in found.elements() for tag in tags(caption))
    assert count["keep"] == 2000
    assert all(abs(count[tag] / 2000 - 0.75) < 0.04 for tag in "abcd")


def test_every_order_comes_as_often():
    found = drawn("a, b, c", options(shuffle_tags=True), 3000)
    assert len(found) == 6 and all(abs(count / 3000 - 1 / 6) < 0.03 for count in found.values())


@pytest.mark.parametrize(
    ("caption", "possible"),
    [
        ("a {red|blue} cat", {"a red cat", "a blue cat"}),
        ("{a|{b|c} d}", {"a", "b d", "c d"}),
        ("a {big |}cat", {"a big cat", "a cat"}),
        ("one\n\n two \n", {"one", "two"}),
        ("{a|b\n", {"{a|b"}),
        ("a|b}", {"a|b}"}),
        ("{", {"{"}),
        ("{a|b}{c", {"a{c", "b{c"}),
        ("", {""}),
    ],
)
def test_wildcards_draw_one_of_each_choice(caption, possible):
    assert set(drawn(caption, options(wildcards=True))) == possible


def test_without_wildcards_braces_and_commas_stay_as_written():
    assert draw_caption("a {red|blue} cat,1,000", options(), Random(0)) == "a {red|blue} cat,1,000"


def test_deep_braces_are_no_trouble():
    deep = "{" * 20_000 + "a" + "}" * 20_000
    assert draw_caption(deep, options(wildcards=True), Random(0)) == "a"


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a cat", "sks cat, a cat"),
        ("sks cat", "sks cat"),
        ("SKS cat on a mat", "SKS cat on a mat"),
        ("sks cats", "sks cat, sks cats"),
        ("a mat, Sks Cat", "a mat, Sks Cat"),
        ("a mat under a sks cat", "sks cat, a mat under a sks cat"),
        ("", "sks cat"),
    ],
)
def test_the_trigger_word_is_there_once(caption, shown):
    assert plain_caption(caption, options(trigger_word=" sks  cat ")) == shown


def test_a_dropped_trigger_word_comes_back():
    given = options(trigger_word="sks", tag_dropout=0.9)
    assert all("sks" in tags(caption) for caption in drawn("a, sks, b", given))


def test_prefix_and_suffix_stand_outside_the_tags():
    given = options(
        shuffle_tags=True, caption_prefix="ink,", caption_suffix="on paper", trigger_word="sks"
    )
    for caption in drawn("a, b", given):
        assert caption in ("sks, ink, a, b on paper", "sks, ink, b, a on paper")
    assert plain_caption("", options(caption_prefix="ink")) == "ink"
    assert plain_caption("a", options(caption_prefix="sks ink", trigger_word="sks")) == "sks ink a"
