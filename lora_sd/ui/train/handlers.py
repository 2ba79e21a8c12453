"""What happens in the Train tab's form; the run beside it is run_handlers.py's."""

import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lora_sd import durable
from lora_sd.config import EXAMPLE_FOLDER, Config
from lora_sd.errors import UserError
from lora_sd.ui import fields
from lora_sd.ui.bases import find_base, find_vae
from lora_sd.ui.data import pictures
from lora_sd.ui.data.pictures import PictureFolder
from lora_sd.ui.families import CONFIGS, TITLES
from lora_sd.ui.fields import FormError
from lora_sd.ui.queue import Submitted
from lora_sd.ui.texts import say
from lora_sd.ui.train import further, recipes
from lora_sd.ui.train.plan import PlanCancelled, Planner, RunPlan
from lora_sd.ui.train.recipes import Followed, Wish
from lora_sd.ui.train.run_handlers import RunHandlers
from lora_sd.ui.workplace import Workplace

EXAMPLE = f"example/{Path(EXAMPLE_FOLDER).name}"
SUBJECTS = tuple(recipes.SHOWINGS)
CARDS = (recipes.OWN, *recipes.CARDS_GB)
SUBJECT, CARD = "recipe.subject", "recipe.card"
OWN_PARTS: Mapping[str, Any] = {SUBJECT: SUBJECTS[0], CARD: recipes.OWN, **further.FIRST}
"""The form's parts that are no settings, and what they hold first."""
RESET_GROUPS = ("adapter", "train", "optimizer", "objective", "memory")


@dataclass(frozen=True)
class Started:
    """What came of a press on Start: a run, or what is wrong with which fields.

    Attributes:
        problems: sentences that belong to no single field.
        by_field: sentences by field of the form.
    """

    submitted: Submitted | None = None
    problems: list[str] = field(default_factory=list)
    by_field: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Planned:
    """A plan with the layers it counts, a line a kind; or why there is none."""

    plan: RunPlan | None = None
    layers: str = ""
    notices: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shown:
    """What a data set holds, for the page."""

    pairs: list[tuple[Path, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    masks: int = 0


class TrainHandlers:
    """The form's handlers. A form is what its fields hold, by setting or by name in `OWN_PARTS`.

    Args:
        place: what all tabs work on.
        planner: makes the plans.
    """

    def __init__(self, place: Workplace, planner: Planner | None = None) -> None:
        self.place = place
        self.running = RunHandlers(place)
        self._planner = planner or Planner()

    def secret(self) -> str:
        """What browsers keep the form with: the same after a restart, so that it is still there."""
        file = self.place.outputs / ".app" / "form-secret"
        try:
            return file.read_text(encoding="utf-8")
        except OSError:
            made = secrets.token_urlsafe(16)
        with contextlib.suppress(OSError):  # then the form is forgotten when the app ends
            file.parent.mkdir(parents=True, exist_ok=True)
            durable.write_text(file, made)
        return made

    def starting_form(self) -> dict[str, Any]:
        """What the form shows first: the example, a style, on the embedded base."""
        shown = {
            name: fields.shown_value(name, value)
            for name, value in fields.form_values(Config(), fields.FIELDS).items()
        }
        offered = [folder.id for folder in self.folders()]
        shown["data.folder"] = EXAMPLE if EXAMPLE in offered else next(iter(offered), None)
        form = {**OWN_PARTS, **shown}
        followed = self.follow(form, form)
        return {**form, **followed.updates}

    def folders(self) -> list[PictureFolder]:
        """The data sets that can be chosen."""
        return pictures.offered_folders(self.place.outputs, self.place.pictures)

    def show_folder(self, folder_id: object) -> Shown:
        """The pictures and captions of a data set."""
        try:
            folder = self._folder(folder_id)
            return Shown(pictures.captioned(folder.path), masks=pictures.mask_count(folder.path))
        except UserError as error:
            return Shown(problems=error.problems)

    def mask_note(self, folder_id: object, setting: object) -> str:
        """That the data set's mask files are not used; '' where they are, or there are none."""
        try:
            return pictures.mask_sentence(
                pictures.mask_count(self._folder(folder_id).path), setting
            )
        except UserError:
            return ""

    def totals(self, form: Mapping[str, Any]) -> str:
        """How many pictures a run shows, and how often; nothing where numbers are missing."""
        factors = ("train.steps", "train.batch_size", "train.gradient_accumulation")
        numbers: list[Any] = [form.get(name) for name in factors]
        count = self._count(form)
        known = all(fields.is_value(*pair) for pair in zip(factors, numbers, strict=True))
        if not count or not known or min(numbers) < 1:
            return ""
        steps, size, passes = map(int, numbers)
        seen = steps * size * passes
        return say(
            "train.totals", steps=steps, of=size * passes, seen=seen, epochs=seen / count,
            pictures=count,
        )  # fmt: skip

    def follow(self, form: Mapping[str, Any], before: object, all_of_it: bool = False) -> Followed:
        """Set the form as its recipe has it for its base and its pictures, with sample prompts that
        fit them. What was changed by hand stays.

        Args:
            before: what the page set the fields to last.
            all_of_it: set what was changed by hand, too.
        """
        before = {**before} if isinstance(before, dict) else {}
        shown = self.show_folder(form.get("data.folder"))
        also = self._fitting_prompts(form, shown)
        if all_of_it:
            plain = fields.form_values(Config(), fields.FIELDS)
            also |= {
                name: fields.shown_value(name, value)
                for name, value in plain.items()
                if name.partition(".")[0] in RESET_GROUPS and name not in recipes.recipe_settings()
            }
            before = {**before, **form}
        wish, said = self._wish(form, self._count(form))
        followed = recipes.follow(form, before, wish, also)
        return Followed(followed.shown, followed.updates, said + followed.reasons)

    def restored(self, saved: object) -> dict[str, Any]:
        """The values of a form that a browser kept, as far as they are still values of fields."""
        if not isinstance(saved, dict):
            return {}
        offered = {folder.id for folder in self.folders()}
        return {name: one for name, one in saved.items() if _could_hold(name, one, offered)}

    def start(self, form: Mapping[str, Any]) -> Started:
        """Check everything, and start the trainer, or put the run into the queue."""
        try:
            config = self.config(form)
            return Started(self.place.queue.submit(config))
        except FormError as error:
            return Started(problems=error.others, by_field=error.by_field)
        except UserError as error:
            return Started(problems=error.problems)

    def is_busy(self) -> bool:
        """Whether a start would only be put into the queue."""
        return self.place.trainer.current() is not None

    def plan(self, form: Mapping[str, Any], on_wait: Callable[[float], bool]) -> Planned:
        """What a run of the form needs, with the layers that learn.

        Args:
            on_wait: called every moment with the seconds it took; True ends it.
        """
        try:
            config = self.config(form)
            layers, notices = _layers(config)
            # A step that is measured beside a training says nothing of either's time.
            plan = self._planner.plan(config, not self.is_busy(), on_wait)
        except PlanCancelled:
            return Planned(problems=[say("train.plan.cancelled")])
        except UserError as error:
            return Planned(problems=[fields.in_page_words(one) for one in error.problems])
        return Planned(plan, layers, [fields.in_page_words(one) for one in notices])

    def config(self, form: Mapping[str, Any]) -> Config:
        """The configuration of a form, with its data sets and its base found by their names.

        Raises:
            FormError: all that is wrong with it.
        """
        wrong: dict[str, str] = {}

        def found(name: str, find: Callable[[], Any]) -> Any:
            try:
                return find()
            except UserError as error:
                wrong[name] = " ".join(error.problems)
                return None

        place = self.place
        folder = found("data.folder", lambda: self._folder(form.get("data.folder")))
        name = str(form.get("output.name") or "").strip()
        values = {
            **{name: form[name] for name in fields.FIELDS if name in form},
            "base.model": found(
                "base.model", lambda: find_base(place.models, form.get("base.model"))
            ),
            "base.vae": found("base.vae", lambda: find_vae(place.models, form.get("base.vae"))),
            "output.name": name or place.queue.free_name(folder.path.name if folder else ""),
        }
        text = values.pop("sample.prompt_file", None)
        prompts = found("sample.prompt_file", lambda: further.prompt_file(place.outputs, text))
        folders: list[dict[str, Any]] = []
        for part in (further.MORE, further.VALIDATION, further.REGULARISATION):
            folders += found(part, partial(further.further_folders, place, form, part)) or []
        paths = {
            "data.folder": str(folder.path) if folder else None,
            "data.folders": folders,
            "output.folder": str(place.outputs),
            "sample.prompt_file": str(prompts) if prompts else None,
        }
        others: list[str] = []
        try:
            config = fields.config_from_form(values, paths)
        except FormError as error:
            wrong, others = {**error.by_field, **wrong}, error.others
        if wrong or others:
            raise FormError(others, wrong)
        return config

    def _folder(self, folder_id: object) -> PictureFolder:
        return pictures.find_folder(self.place.outputs, self.place.pictures, folder_id)

    def _count(self, form: Mapping[str, Any]) -> int:
        """How many pictures the chosen data sets hold."""
        chosen = [form.get("data.folder"), *further.several(form.get(further.MORE))]
        return sum(len(self.show_folder(one).pairs) for one in dict.fromkeys(map(str, chosen)))

    def _wish(self, form: Mapping[str, Any], count: int) -> tuple[Wish | None, list[str]]:
        """(what the recipe is for, what is to be said of the base)."""
        try:
            model = find_base(self.place.models, form.get("base.model"))
        except UserError as error:
            return None, error.problems
        family, guessed = recipes.family_of(model)
        if family not in CONFIGS:
            return None, [say("train.recipe.unknown", model=model)]
        card, subject = form.get(CARD), form.get(SUBJECT)
        if (
            not isinstance(card, str) or card not in recipes.CARDS_GB
        ):  # tiny-sd is the same on each: no need to look
            card = recipes.CPU if family == "tiny-sd" else recipes.own_card()
        wish = Wish(str(subject if subject in SUBJECTS else "style"), str(card), family, count)
        title = TITLES[family]
        said = [say("train.recipe.guessed", model=model, title=title)] if guessed else []
        return wish, said

    def _fitting_prompts(self, form: Mapping[str, Any], shown: Shown) -> dict[str, Any]:
        """Sample prompts that fit the pictures: the example's own; of others the first captions,
        with the trigger word."""
        if form.get("data.folder") == EXAMPLE:
            example = recipes.example_prompts()
            return {"sample.prompts": "\n".join(example)}
        if not shown.pairs:
            return {}
        common, trigger = _text(form.get("data.caption")), _text(form.get("data.trigger_word"))
        filled = [caption or common for _, caption in shown.pairs]
        return {"sample.prompts": "\n".join(pictures.prompts_from(filled, trigger))}


def _layers(config: Config) -> tuple[str, list[str]]:
    """(the layers that settings choose, a line a kind; what clients will not read of them), from
    the base's files alone; empty where they are not here.

    Raises:
        UserError: settings do not go together.
    """
    from lora_sd import clients, layer_choice
    from lora_sd.base_files import NotHere, open_base
    from lora_sd.formats import fitting_format
    from lora_sd.layers import LayerOptions
    from lora_sd.parts import unread_layers

    try:
        base = open_base(config.base.model)
    except NotHere:
        return "", []
    unread = unread_layers(base.shapes, config.base.clip_skip)
    wanted = {
        name: shape
        for name, shape in base.shapes.items()
        if name.startswith("unet.") or (config.adapter.text_encoder and name not in unread)
    }
    plans = layer_choice.choose_layers(wanted, **config.adapter.layer_choice())
    options = LayerOptions(**config.adapter.layer_options())
    bytes_per_weight = 4 if config.output.dtype == "float32" else 2
    planned = layer_choice.planned_adapter(plans, options)
    file_format, notices = fitting_format(planned, config.output.format)
    if file_format == "kohya":
        notices = notices + clients.ignored_layers(planned, base.family, file_format)
    return layer_choice.describe(plans, options, bytes_per_weight), notices


def _could_hold(name: str, value: object, offered: set[str]) -> bool:
    """Whether a part of the form could hold a value that a browser kept."""
    if name == further.MORE:
        return isinstance(value, list) and all(_is_one(one, offered) for one in value)
    if name in (further.VALIDATION, further.REGULARISATION):
        return _is_one(value, {"", further.DRAWN, *offered})
    if name == "data.folder":
        return _is_one(value, offered)
    if name in (SUBJECT, CARD):
        return _is_one(value, {*SUBJECTS, *CARDS})
    if name in OWN_PARTS:
        return isinstance(value, str) == isinstance(OWN_PARTS[name], str) and not isinstance(
            value, dict | list
        )
    return name in fields.FIELDS and fields.is_value(name, value)


def _is_one(value: object, known: set[str]) -> bool:
    return isinstance(value, str) and value in known


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
