"""Recipes: what the form is set to for a subject, a card, a family of base models and so many
pictures.

A recipe is the family's config of configs/, changed by what the subject and the card want. Its
figures are those that trainers agree on, not measurements of ours, but for tiny-sd's, which are
measured (docs/LOG.md). A card changes how the work is cut up, not what is learnt: a step is of the
same number of pictures everywhere. A slow test has the plan say that each fits its card.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lora_sd.config import config_from_values, read_yaml
from lora_sd.data.report.base_facts import family_by_name
from lora_sd.errors import ConfigError, UserError
from lora_sd.ui import fields
from lora_sd.ui.families import CONFIGS, TITLES
from lora_sd.ui.texts import say

SHOWINGS = {"style": 170, "character": 170, "object": 130}
"""How often each picture is shown, by subject."""
FEWEST_SHOWN, MOST_SHOWN = 1_500, 12_000  # pictures, in the whole run
CARDS_GB = {"small": 8, "medium": 12, "large": 24}
OWN, CPU = "own", "cpu"
_NARROW = {
    "memory.gradient_checkpointing": True,
    "train.batch_size": 1,
    "train.gradient_accumulation": 4,
}
_WIDE = {
    "memory.gradient_checkpointing": False,
    "train.batch_size": 4,
    "train.gradient_accumulation": 1,
}
CARDS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd15": {"small": _NARROW, "medium": _WIDE, "large": _WIDE},
    "sd21": {"small": _NARROW, "medium": _NARROW, "large": _WIDE},
    "sdxl": {
        "small": {**_NARROW, "memory.base_weights": "int8", "memory.vae_slicing": True},
        "medium": {**_NARROW, "memory.vae_slicing": True, "sample.scales": []},
        "large": {**_WIDE, "memory.gradient_checkpointing": True},
    },
}
"""What a card changes; tiny-sd fits every one."""
NOT_OF_A_RECIPE = {"base.model", "data.folder", "sample.prompts"}


@dataclass(frozen=True)
class Wish:
    """What a recipe is for.

    Attributes:
        subject: 'style', 'character' or 'object'.
        card: 'small', 'medium', 'large', or 'cpu' for none.
        family: of the base model.
        pictures: how many there are to learn from.
    """

    subject: str
    card: str
    family: str
    pictures: int


@dataclass(frozen=True)
class Followed:
    """Fields to set, sentences on why and on what is set, and what the form is set to now."""

    shown: Mapping[str, Any]
    updates: Mapping[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@cache
def recipe(wish: Wish) -> Mapping[str, Any]:
    """Every setting that recipes set, as its field shows it.

    Raises:
        ConfigError: the family's config is damaged.
    """
    config = config_from_values(read_yaml(CONFIGS[wish.family]))
    values = fields.form_values(config, fields.FIELDS)
    values |= CARDS.get(wish.family, {}).get(wish.card, {})
    if wish.card == CPU and wish.family != "tiny-sd":
        values |= {**_NARROW, "memory.gradient_checkpointing": False}
    if wish.subject == "object":
        values |= {
            name: max(1, values[name] // 2) for name in ("adapter.rank", "adapter.conv_rank")
        }
    if wish.subject == "character" and wish.family in ("sd15", "sd21"):
        values["adapter.text_encoder"] = True
    steps = _steps(wish, values["train.batch_size"] * values["train.gradient_accumulation"])
    for name in ("optimizer.warmup_steps", "sample.every_steps", "output.save_every_steps"):
        values[name] = max(1, round(values[name] * steps / config.train.steps))
    values["train.steps"] = steps
    return {name: fields.shown_value(name, values[name]) for name in recipe_settings()}


@cache
def recipe_settings() -> list[str]:
    """The settings that recipes set, in the order of the form."""
    given = [read_yaml(file) for file in CONFIGS.values()]
    names = {f"{group}.{key}" for one in given for group, keys in one.items() for key in keys}
    names |= {name for cards in CARDS.values() for card in cards.values() for name in card}
    names |= {"adapter.text_encoder"}
    return [name for name in fields.FIELDS if name in names - NOT_OF_A_RECIPE]


def follow(
    form: Mapping[str, Any], before: Mapping[str, Any], wish: Wish | None, also: Mapping[str, Any]
) -> Followed:
    """Set the form as the recipe has it.

    Args:
        before: what the page set the fields to last: a field that shows anything else was changed
            by hand, and stays.
        wish: None: the base is of no known family, and nothing is set for it.
        also: further fields that the page sets, and what to.
    """
    try:
        now = {**(recipe(wish) if wish else {}), **also}
    except ConfigError as error:
        return Followed(before, reasons=error.problems)
    others = {name: value for name, value in now.items() if form.get(name) != value}
    kept = {n for n in others if n in before and form.get(n) != before[n]}
    # Of those that the form has already, too: what it sent may be older than what it shows by now.
    updates = {name: value for name, value in now.items() if name not in kept}
    said = reasons(wish) if wish else []
    if newly := others.keys() - kept - also.keys():
        said.append(say("train.recipe.set", names=_labels(newly)))
    if kept - also.keys():
        said.append(say("train.recipe.kept", names=_labels(kept - also.keys())))
    return Followed({**before, **now}, updates, said)


def reasons(wish: Wish) -> list[str]:
    """Why the recipe is as it is, a sentence each for subject, card and steps."""
    values = recipe(wish)
    title, gb = TITLES[wish.family], CARDS_GB.get(wish.card)
    if wish.family == "tiny-sd" or gb is None:
        card = say("train.recipe.tiny" if wish.family == "tiny-sd" else "train.recipe.cpu")
    else:
        kind = "wide"
        if values["memory.base_weights"] != "full":
            kind = "packed"
        elif values["memory.gradient_checkpointing"]:
            kind = "narrow" if values["train.batch_size"] == 1 else "checkpointed"
        card = say(f"train.recipe.{kind}", title=title, gb=gb)
    factors = ("train.steps", "train.batch_size", "train.gradient_accumulation")
    steps, size, passes = (int(values[name]) for name in factors)
    pictures = max(1, wish.pictures)
    said = {"pictures": wish.pictures, "steps": steps, "of": size * passes}
    times = round(steps * size * passes / pictures)
    return [
        say(f"train.recipe.subject.{wish.subject}"),
        *([say("train.recipe.text_encoder")] if values["adapter.text_encoder"] else []),
        card,
        *([] if values["sample.scales"] else [say("train.recipe.no_grid")]),
        say("train.recipe.steps", times=times, **said),
    ]


def example_prompts() -> list[str]:
    """The sample prompts of the embedded base's config, which fit the example's pictures."""
    return list(config_from_values(read_yaml(CONFIGS["tiny-sd"])).sample.prompts)


def family_of(model: str) -> tuple[str, bool]:
    """(the family of a base model from its files alone, or '', whether only its name tells)."""
    from lora_sd.known_bases import EMBEDDED

    if model in EMBEDDED:
        return model, False
    from lora_sd.base_files import open_base
    from lora_sd.base_files.opening import NotHere

    try:
        return open_base(model).family, False
    except NotHere:
        return family_by_name(model), True
    except UserError:
        return "", False


def own_card() -> str:
    """The card of this machine by its memory; 'cpu' where there is none."""
    import torch

    if not torch.cuda.is_available():
        return CPU
    gb = torch.cuda.get_device_properties(0).total_memory / 2**30
    fitting = [name for name, least in CARDS_GB.items() if gb > least - 1]  # some is the driver's
    return fitting[-1] if fitting else "small"


def _steps(wish: Wish, of_a_step: int) -> int:
    shown = min(MOST_SHOWN, max(FEWEST_SHOWN, SHOWINGS[wish.subject] * wish.pictures))
    return max(50, round(shown / of_a_step / 50) * 50)


def _labels(names: Iterable[str]) -> str:
    return ", ".join(fields.label(name) for name in fields.FIELDS if name in names)
