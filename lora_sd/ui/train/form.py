"""The form of the Train tab: what is laid out where."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.ui import fields
from lora_sd.ui.bases import offered_bases, offered_vaes
from lora_sd.ui.data.pictures import PictureFolder
from lora_sd.ui.texts import say
from lora_sd.ui.train import further
from lora_sd.ui.train.handlers import CARD, CARDS, SUBJECT, SUBJECTS, TrainHandlers
from lora_sd.ui.train.more_settings import build_more_settings

MAIN_MIN_PX = 160


@dataclass(frozen=True)
class TrainForm:
    """The parts of the form.

    Attributes:
        fields: what is filled in, by setting or by name in `handlers.OWN_PARTS`.
        folds: of a field that is folded away.
        kept, set_to: in the browser, across reloads: what the fields hold, and what the page set
            them to.
        wrong: the fields that the last press on Start found wrong.
    """

    fields: dict[str, Component]
    folds: dict[str, gr.Accordion]
    more: gr.Accordion
    kept: gr.BrowserState
    set_to: gr.BrowserState
    wrong: gr.State
    thumbs: gr.HTML
    to_pictures: gr.Button
    mask_note: gr.HTML
    recipe_note: gr.HTML
    reset: gr.Button
    totals: gr.HTML
    make_plan: gr.Button
    cancel_plan: gr.Button
    plan: gr.HTML
    problems: gr.HTML
    start: gr.Button


TO_FIELD = """
element.addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link) return;
  event.preventDefault();  // it is relative to Gradio's <base>: at another address it would reload
  const field = document.querySelector(link.getAttribute("href"));
  field.scrollIntoView({ block: "center" });
  field.querySelector("input, textarea, button")?.focus({ preventScroll: true });
});
"""


def build_train_form(handlers: TrainHandlers) -> TrainForm:
    """Lay out the form inside the current column."""
    secret, first = handlers.secret(), handlers.starting_form()
    parts: dict[str, Component] = {}

    def add(name: str, **options: Any) -> None:
        if build := special.get(name):
            parts[name] = build(**options)
        else:
            parts[name] = fields.component_showing(name, first[name], **options)

    special = _special_parts(handlers, first)
    kept = gr.BrowserState(None, storage_key="lora_sd.form", secret=secret)
    set_to = gr.BrowserState(first, storage_key="lora_sd.set", secret=secret)
    _heading("train.pictures")
    add("data.folder")
    thumbs = gr.HTML(elem_id="train-thumbs")
    with gr.Row(elem_classes="actions"):
        to_pictures = gr.Button(say("train.to_pictures"), size="md", elem_id="to-pictures")
    mask_note = gr.HTML(visible=False, elem_id="mask-note")
    with gr.Row(elem_classes="level"):
        add("data.trigger_word", placeholder=say("train.none"))
        add("data.caption", placeholder=say("train.caption_example"))
    _heading("train.what")
    add("base.model")
    with gr.Row(elem_classes="level"):
        add(SUBJECT)
        add(CARD)
    recipe_note = gr.HTML(elem_id="recipe-note")
    with gr.Row(elem_classes="actions"):
        reset = gr.Button(say("train.reset"), size="sm", elem_id="reset-recipe")
    _heading("train.how")
    add("output.name", placeholder=say("train.name_example"))
    with gr.Row(elem_classes="level main-fields"):
        for name in (
            "train.steps", "optimizer.learning_rate", "train.batch_size", "adapter.rank",
            "data.resolution_px", "train.seed",
        ):  # fmt: skip
            add(name, min_width=MAIN_MIN_PX)
    totals = gr.HTML(elem_id="totals")
    add("sample.prompts", lines=3)
    with gr.Accordion(say("train.more"), open=False, elem_id="more") as more:
        folds = build_more_settings(add)
        gr.HTML(f'<p class="hint">{say("train.not_here")}</p>')
    with gr.Row(elem_classes="actions"):
        make_plan = gr.Button(say("train.plan.make"), size="md", elem_id="plan-run")
        cancel_plan = gr.Button(
            say("train.plan.cancel"), size="md", visible=False, elem_id="cancel-plan"
        )
    plan = gr.HTML(elem_id="plan")
    with gr.Column(elem_classes="start-bar"):
        problems = gr.HTML(elem_id="problems", js_on_load=TO_FIELD)
        start = gr.Button(say("train.start"), variant="primary", size="lg", elem_id="start")
    return TrainForm(
        parts, folds, more, kept, set_to, gr.State([]), thumbs, to_pictures, mask_note, recipe_note,
        reset, totals, make_plan, cancel_plan, plan, problems, start,
    )  # fmt: skip


def choices_of_sets(folders: Sequence[PictureFolder], name: str) -> list[tuple[str, str]]:
    """What can be chosen as a data set for a part of the form, as (words, id)."""
    choices = [(folder.label, folder.id) for folder in folders]
    if name == further.VALIDATION:
        return [(say("train.none"), ""), *choices]
    if name == further.REGULARISATION:
        drawn = (say("train.drawn"), further.DRAWN)
        return [(say("train.none"), ""), drawn, *choices]
    return choices


def _special_parts(
    handlers: TrainHandlers, first: dict[str, Any]
) -> dict[str, Callable[..., Component]]:
    """How those fields are built that config.py does not describe well enough."""
    models = handlers.place.models
    offered = handlers.folders()

    def data_set(name: str, **options: Any) -> Component:
        return gr.Dropdown(
            choices_of_sets(offered, name),
            value=first[name],
            label=fields.label(name),
            info=fields.help_text(name),
            multiselect=name == further.MORE,
            allow_custom_value=True,  # what was saved since the page was built; it is checked
            elem_id=name.replace(".", "-"),
            **options,
        )

    def part(kind: type[Component], name: str, **options: Any) -> Component:
        return kind(
            value=first[name],
            label=fields.label(name),
            info=fields.help_text(name),
            elem_id=name.replace(".", "-"),
            **options,
        )

    def radio(name: str, key: str, values: Sequence[str], **options: Any) -> Component:
        choices = [(say(f"{key}.{value}"), value) for value in values]
        return part(gr.Radio, name, choices=choices, elem_classes="choice", **options)

    bases = [(base.label, base.id) for base in offered_bases(models)]
    vaes: list[Any] = [(say("train.own_vae"), ""), *offered_vaes(models)]
    sets = ("data.folder", further.MORE, further.VALIDATION, further.REGULARISATION)
    return {
        **{name: lambda name=name, **options: data_set(name, **options) for name in sets},
        "base.model": lambda **options: part(
            gr.Dropdown, "base.model", choices=bases, allow_custom_value=True, **options
        ),
        "base.vae": lambda **options: part(
            gr.Dropdown, "base.vae", choices=vaes, allow_custom_value=True, **options
        ),
        SUBJECT: lambda **options: radio(SUBJECT, "train.subject", SUBJECTS, **options),
        CARD: lambda **options: radio(CARD, "train.card", CARDS, **options),
        further.CLASS_CAPTION: lambda **options: part(gr.Textbox, further.CLASS_CAPTION, **options),
        further.CLASS_PICTURES: lambda **options: part(
            gr.Number, further.CLASS_PICTURES, **options
        ),
        further.PRIOR_WEIGHT: lambda **options: part(
            gr.Number, further.PRIOR_WEIGHT, step=0.1, **options
        ),
        "sample.prompt_file": lambda **options: fields.component_showing(
            "sample.prompt_file", first["sample.prompt_file"], lines=3, **options
        ),
    }


def _heading(key: str) -> None:
    gr.HTML(f"<h2>{say(key)}</h2>", elem_classes="heading")
