"""Form fields: what config.py says, and what the browser sends."""

import math
from pathlib import Path
from typing import Any

import pytest

from lora_sd.config import Config, config_from_values, read_yaml, settings
from lora_sd.errors import UserError
from lora_sd.ui import fields
from lora_sd.ui.launch import PROJECT
from lora_sd.ui.train import further
from lora_sd.ui.train.more_settings import MAIN_FIELDS, folded_settings


@pytest.mark.parametrize("file", [None, *sorted((PROJECT / "configs").glob("*.yaml"))])
def test_every_setting_survives_the_form(file: Path | None) -> None:
    before = config_from_values(read_yaml(file)) if file else Config()
    values = fields.form_values(before, fields.FIELDS)
    form = {name: fields.component(name, values[name]).value for name in fields.FIELDS}
    config = fields.config_from_form(form)
    assert config == before


def test_help_and_range_are_those_of_the_config() -> None:
    component = fields.component("adapter.rank", 8)
    assert component.label == "Rank"
    assert component.info == (
        "Inner size of the adapter in linear layers and 1x1 convolutions; 0 leaves them alone. "
        "0 to 1024."
    )
    assert fields.help_text("optimizer.learning_rate").endswith("Above 0, up to 10.")


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("train.steps", math.nan, "'Steps' must be a finite number."),
        ("train.steps", True, "'Steps' is empty: write a number."),
        ("train.steps", None, "'Steps' is empty: write a number."),
        ("train.steps", 2.7, "'Steps' is 2.7, but must be a whole number."),
        ("train.steps", 0, "'Steps' is 0: input should be greater than or equal to 1."),
        ("train.steps", [3], "'Steps' is empty: write a number."),
        (
            "optimizer.schedule",
            "sideways",
            "'Learning rate schedule' is 'sideways': input should be 'constant', 'linear'",
        ),
        ("memory.gradient_checkpointing", "yes", "'Gradient checkpointing' must be on or off."),
        ("base.model", ["a"], "'Base model' must be text."),
        ("base.model", "x" * 30_000, "'Base model' is too long"),
        ("sample.scales", "0, one", "'Scales of the grid' holds 'one', which is no number."),
        (
            "data.resolution_px",
            "512, 5",
            "'Resolution (px)' is 5: input should be a multiple of 8.",
        ),
        ("data.resolution_px", "512.5", "'Resolution (px)' is 512.5, but must be a whole number."),
        ("data.max_tokens", 80, "'Longest caption (tokens)' is 80: input should be 75, 150 or"),
        ("data.max_tokens", True, "'Longest caption (tokens)' must be text."),
        ("output.name", "../x", "'Name of the run' is '../x'"),
    ],
)
def test_what_the_browser_sends_is_checked(name: str, wrong: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        fields.config_from_form({name: wrong})
    assert caught.value.problems[0].startswith(sentence)


def test_problems_of_every_kind_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        fields.config_from_form({"train.steps": None, "train.batch_size": 0, "adapter.rank": -1})
    assert len(caught.value.problems) == 3


def test_a_number_that_may_be_empty_stays_empty_through_the_form():
    form = fields.form_values(Config(), fields.FIELDS)
    assert fields.component("adapter.alpha", None).value in ("", None)
    form = {name: _as_shown(name, value) for name, value in form.items()}
    assert fields.config_from_form(form | {"adapter.alpha": ""}).adapter.alpha is None
    assert fields.config_from_form(form | {"adapter.alpha": " 4 "}).adapter.alpha == 4
    with pytest.raises(UserError, match="no number"):
        fields.config_from_form(form | {"adapter.alpha": "much"})


def test_a_share_is_set_in_hundredths() -> None:
    steps = {
        name: fields.component(name, 0).step
        for name in ("data.caption_dropout", "data.crop_jitter", "train.steps", "sample.guidance")
    }
    assert list(steps.values()) == [0.01, 0.01, 1, 1], steps


def test_several_resolutions_are_one_field() -> None:
    assert fields.component("data.resolution_px", [512, 768]).value == "512, 768"
    config = fields.config_from_form({"data.resolution_px": "512, 768"})
    assert config.data.resolution_px == [512, 768]


def test_what_can_be_chosen_among_numbers_stays_a_number() -> None:
    component = fields.component("data.max_tokens", 150)
    assert component.value == 150 and [value for _, value in component.choices] == [75, 150, 225]
    assert fields.config_from_form({"data.max_tokens": 150}).data.max_tokens == 150


def test_every_setting_is_on_the_page_once() -> None:
    folded = [name for names in folded_settings().values() for name in names]
    everything = sorted([*fields.FIELDS, *further.FIRST])
    assert sorted([*folded, *MAIN_FIELDS]) == everything
    assert all(folded_settings().values())
    assert {*dict(settings())} - {*fields.FIELDS} == {*fields.NOT_ON_THE_PAGE}


def test_every_field_has_a_label_of_its_own_and_help() -> None:
    names = [*fields.FIELDS, *further.FIRST]
    assert len({fields.label(name) for name in names}) == len(names)
    assert all(fields.help_text(name).endswith(".") for name in names)


def test_help_calls_other_settings_as_the_page_does() -> None:
    assert "'Batch size' times this" in fields.help_text("train.gradient_accumulation")
    assert "huber_c" not in fields.help_text("objective.huber_schedule")


def test_what_is_wrong_is_told_apart_by_field() -> None:
    with pytest.raises(fields.FormError) as caught:
        fields.config_from_form(
            {
                "train.steps": 0,
                "sample.scales": "x",
                "adapter.dora": "input",
                "adapter.up_bias": True,
            }
        )
    error = caught.value
    assert error.by_field == {
        "train.steps": "'Steps' is 0: input should be greater than or equal to 1.",
        "sample.scales": "'Scales of the grid' holds 'x', which is no number.",
    }
    assert len(error.others) == 1 and "dora" in error.others[0]
    assert {*error.problems} == {*error.by_field.values(), *error.others}


def test_what_is_wrong_is_no_markdown() -> None:
    assert fields.as_plain("*a* [b](c) `d`") == "\u2217a\u2217 (b)(c) 'd'"


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("train.steps", 3, True),
        ("train.steps", "many", False),
        ("train.steps", [3], False),
        ("optimizer.schedule", "cosine", True),
        ("optimizer.schedule", "sideways", False),
        ("memory.compile", True, True),
        ("memory.compile", "yes", False),
        ("data.max_tokens", 75, True),
    ],
)
def test_what_a_field_could_hold(name: str, value: Any, fits: bool) -> None:
    assert fields.is_value(name, value) is fits


def _as_shown(name: str, value: Any) -> Any:
    return fields.component(name, value).value
