"""Prompt files: kohya's options are understood, and what is wrong is told at once, in sentences."""

import pytest
from heard import heard

from lora_sd.errors import ConfigError
from lora_sd.generate import PictureSettings
from lora_sd.sample_prompts import SamplePrompts, read_prompts

SHARED = PictureSettings("", "grey", seed=10, steps=20, guidance=7, width_px=64, height_px=64)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.txt"


def read(file, text):
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_prompts(file, SHARED, 8)


def refused(file, text):
    with pytest.raises(ConfigError) as caught:
        read(file, text)
    return caught.value.problems


def test_every_option_of_kohyas_is_read(file):
    line = "a red fox, in snow --n blurry, text --w 512 --h 768 --d 7 --s 30 --l 5.5 --am 0.8"
    assert read(file, line) == [
        PictureSettings("a red fox, in snow", "blurry, text", 7, 30, 5.5, 512, 768, "", 0.8)
    ]


def test_what_a_line_does_not_say_is_shared_and_seeds_count_up(file):
    one, two, three = read(file, "fox\nowl --d 3\ncat")
    assert (one.prompt, one.negative_prompt, one.steps, one.width_px) == ("fox", "grey", 20, 64)
    assert (one.seed, two.seed, three.seed) == (10, 3, 12)


def test_comments_empty_lines_and_windows_text_are_passed_over(file):
    found = read(file, b"\xef\xbb\xbf# mine\r\n\r\n  fox \r\n   # owl\r\ncat --n\r\n")
    assert [(one.prompt, one.negative_prompt) for one in found] == [("fox", "grey"), ("cat", "")]


def test_dashes_inside_a_prompt_are_no_options(file):
    assert read(file, "a well-known fox -- at night - 4k")[0].prompt.endswith("-- at night - 4k")


def test_all_problems_are_told_at_once_by_line(file):
    problems = refused(
        file, "fox --q 3 --s many\n# --q\nowl --w 100\ncat --ss ddim\n--w 64\nox --d 1 --d 2"
    )
    assert [problem.split(": ")[0].rpartition(", ")[2] for problem in problems] == [
        "line 1", "line 1", "line 3", "line 4", "line 5", "line 6",
    ]  # fmt: skip
    assert "'--q' is unknown" in problems[0] and "--am (scale of the adapter)" in problems[0]
    assert "'many': write a whole number from 1 to 1000" in problems[1]
    assert "The nearest is 96" in problems[2]
    assert "a sampler" in problems[3] and "no prompt" in problems[4] and "twice" in problems[5]


@pytest.mark.parametrize(
    "option", ["--l nan", "--l", "--am inf", "--s 0", "--s 2.5", "--d -1", "--w 0", "--h 100000"]
)
def test_values_that_cannot_be_are_refused(file, option):
    assert len(refused(file, f"fox {option}")) == 1


@pytest.mark.parametrize("text", ["", "# nothing\n\n", b"\xff\xfe\x00fox"])
def test_a_file_without_prompts_is_refused(file, text):
    assert len(refused(file, text)) == 1


def test_other_kinds_of_prompt_files_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="one prompt a line"):
        read_prompts(tmp_path / "prompts.toml", SHARED, 8)


def test_the_settings_prompts_come_first_and_share_the_count_of_seeds(file):
    file.write_text("owl\ncat")
    found = SamplePrompts(["fox"], file, SHARED, 8).read()
    assert [(one.prompt, one.seed) for one in found] == [("fox", 10), ("owl", 11), ("cat", 12)]


def test_the_file_is_read_again_and_a_broken_one_leaves_the_last(file):
    file.write_text("owl")
    prompts = SamplePrompts([], file, SHARED, 8)
    file.write_text("cat\nox")
    assert [one.prompt for one in prompts.read()] == ["cat", "ox"]
    with heard() as lines:
        for broken in ("cat --w 3", "", None):
            file.unlink() if broken is None else file.write_text(broken)
            assert [one.prompt for one in prompts.read()] == ["cat", "ox"]
    assert "".join(lines).count("stay as they were") == 3


def test_without_prompts_there_is_nothing_to_draw(file):
    file.write_text("owl")
    assert not SamplePrompts([], None, SHARED, 8) and SamplePrompts([], file, SHARED, 8)


def test_a_file_that_is_not_there_is_refused_at_the_start(file):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        SamplePrompts(["fox"], file, SHARED, 8)
