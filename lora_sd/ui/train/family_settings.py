"""Settings that follow the family of the base model, as the shipped configs have them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_sd.config import config_from_values, read_yaml
from lora_sd.data.report.base_facts import family_by_name
from lora_sd.errors import ConfigError, UserError
from lora_sd.ui import fields
from lora_sd.ui.launch import PROJECT

CONFIGS = {
    "tiny-sd": PROJECT / "configs" / "tiny.yaml",
    "sd15": PROJECT / "configs" / "sd15.yaml",
    "sd21": PROJECT / "configs" / "sd21.yaml",
    "sdxl": PROJECT / "configs" / "sdxl.yaml",
}
TITLES = {"tiny-sd": "tiny-sd", "sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL"}
NOT_OF_THE_FAMILY = {"base.model", "data.folder", "sample.prompts"}


@dataclass(frozen=True)
class FamilySettings:
    """What the form was last set to: a family, and its fields as the page shows them."""

    family: str
    shown: Mapping[str, Any]


@dataclass(frozen=True)
class Followed:
    """Fields to set, a sentence that says so, and what the form is set to now."""

    settings: FamilySettings
    updates: Mapping[str, Any] = field(default_factory=dict)
    sentence: str = ""


def settings_of(family: str, also: Iterable[str] = ()) -> FamilySettings:
    """The settings that a family's config gives, and its values of those in `also`.

    Raises:
        ConfigError: the config is damaged.
    """
    given = read_yaml(CONFIGS[family])
    config = config_from_values(given)
    names = {f"{group}.{name}" for group, values in given.items() for name in values}
    names = {*names, *also} & fields.FIELDS.keys() - NOT_OF_THE_FAMILY
    in_order = [name for name in fields.FIELDS if name in names]
    values = fields.form_values(config, in_order)
    return FamilySettings(family, {n: fields.shown_value(n, v) for n, v in values.items()})


def follow(form: Mapping[str, Any], before: FamilySettings) -> Followed:
    """Set the form for the family of its base model, where that is another than `before`.

    A field whose value is not the one that was set before was changed by hand, and stays.
    """
    model = str(form.get("base.model") or "").strip()
    family, guessed = family_of(model)
    if family not in CONFIGS or family == before.family:
        return Followed(before)
    try:
        now = settings_of(family, before.shown)
    except ConfigError as error:
        return Followed(before, sentence=" ".join(error.problems))
    others = {name: value for name, value in now.shown.items() if form.get(name) != value}
    kept = {n for n in others if n in before.shown and form.get(n) != before.shown[n]}
    updates = {name: value for name, value in others.items() if name not in kept}
    said = [f"Set for {TITLES[family]}: {_labels(updates)}."] if updates else []
    if guessed:
        said.insert(0, f"'{model}' is not on this machine yet; its name tells of {TITLES[family]}.")
    if kept:
        said.append(f"Left as you set {'it' if len(kept) == 1 else 'them'}: {_labels(kept)}.")
    return Followed(now, updates, " ".join(said))


def family_of(model: str) -> tuple[str, bool]:
    """(the family of a base model from its files alone, or '', whether only its name tells)."""
    from lora_sd.base_files import open_base
    from lora_sd.base_files.opening import NotHere

    try:
        return open_base(model).family, False
    except NotHere:
        return family_by_name(model), True
    except UserError:
        return "", False


def _labels(names: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(fields.label(name) for name in fields.FIELDS if name in names)
