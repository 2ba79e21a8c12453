"""Recipes: what the form is set to for a subject, a card, a base and pictures."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from make_bases import published_shapes

from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.plan import make_plan
from lora_sd.ui import fields
from lora_sd.ui.families import CONFIGS
from lora_sd.ui.train import recipes
from lora_sd.ui.train.recipes import CARDS_GB, Wish, follow, recipe

TINY = Wish("style", "cpu", "tiny-sd", 24)
WISHES = [
    Wish(*parts, 24) for parts in product(recipes.SHOWINGS, [*CARDS_GB, recipes.CPU], CONFIGS)
]


def form(config: Config, **changes: Any) -> dict[str, Any]:
    values = fields.form_values(config, fields.FIELDS)
    shown = {name: fields.shown_value(name, value) for name, value in values.items()}
    return shown | {name.replace("__", "."): value for name, value in changes.items()}


@pytest.mark.parametrize("wish", WISHES, ids=str)
def test_every_recipe_is_a_configuration_with_its_reasons(wish: Wish) -> None:
    config = fields.config_from_form(form(Config()) | dict(recipe(wish)))
    assert config.train.steps >= 50 and config.optimizer.warmup_steps < config.train.steps
    assert all(sentence.endswith(".") for sentence in recipes.reasons(wish))


def test_the_example_s_recipe_is_the_measured_config() -> None:
    own = config_from_values(read_yaml(CONFIGS["tiny-sd"]))
    made = fields.config_from_form(form(own) | dict(recipe(TINY)))
    assert made == own


def test_cards_cut_the_work_up_and_learn_the_same() -> None:
    for family, subject in product(("sd15", "sd21", "sdxl"), recipes.SHOWINGS):
        made = [recipe(Wish(subject, card, family, 24)) for card in CARDS_GB]
        for name in ("train.steps", "adapter.rank", "optimizer.learning_rate"):
            assert len({values[name] for values in made}) == 1
        pictures = [v["train.batch_size"] * v["train.gradient_accumulation"] for v in made]
        assert set(pictures) == {4}


def test_steps_follow_the_pictures_within_limits() -> None:
    steps = [recipe(Wish("style", "large", "sd15", n))["train.steps"] for n in (1, 24, 5000)]
    assert steps == [400, 1000, 3000]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("card", CARDS_GB)
def test_the_plan_says_that_recipes_fit_their_cards(card: str, family: str, tmp_path: Path) -> None:
    values = dict(recipe(Wish("character", card, family, 24)))
    changes = {"base.model": family, "sample.prompts": "cat", "data.folder": str(tmp_path)}
    config = fields.config_from_form(form(Config()) | values | changes)
    plan = make_plan(config, measured=False, device="cuda", cards_gb=(CARDS_GB[card],))
    assert plan.cards[0].fits and not plan.cards[0].changes, plan.cards[0]


def test_another_base_sets_the_form_but_for_what_was_changed_by_hand() -> None:
    own = config_from_values(read_yaml(CONFIGS["tiny-sd"]))
    before = dict(recipe(TINY))
    sent = form(own, adapter__rank=32, data__resolution_px="768")
    followed = follow(sent, before, Wish("style", "medium", "sdxl", 24), {})
    assert not {"adapter.rank", "data.resolution_px"} & followed.updates.keys()
    assert followed.updates["optimizer.learning_rate"] == 1e-4
    assert followed.reasons[-1].endswith("Left as you set them: Resolution (px), Rank.")
    back = follow(sent | dict(followed.updates), followed.shown, TINY, {})
    assert sent | dict(back.updates) == sent


def test_nothing_is_set_for_a_base_of_no_family() -> None:
    followed = follow(form(Config()), {}, None, {})
    assert not followed.updates and not followed.reasons


def test_the_family_is_told_by_the_files(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "UNet2DConditionModel"]}')
    unet = {
        name.partition(".")[2]: shape
        for name, shape in published_shapes("sd21").items()
        if name.startswith("unet.")
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in unet.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    (tmp_path / "unet").mkdir()
    text = json.dumps(header).encode()
    with open(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # all zeros, which take no room
    assert recipes.family_of(str(tmp_path)) == ("sd21", False)
    assert recipes.family_of("nobody/some-xl-model") == ("sdxl", True)
    assert recipes.family_of("no such") == ("", False)


def test_a_damaged_config_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "sdxl.yaml"
    damaged.write_text("train: {steps: none}")
    monkeypatch.setitem(CONFIGS, "sdxl", damaged)
    followed = follow(form(Config()), {}, Wish("style", "large", "sdxl", 77), {})
    assert not followed.updates and "'train.steps'" in followed.reasons[0]
