"""What happens between the form and its handlers."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.ui import fields
from lora_sd.ui.bases import offered_bases, offered_vaes
from lora_sd.ui.cancelling import Cancelling, page_of
from lora_sd.ui.show import sentences_html, thumbs_html
from lora_sd.ui.texts import say
from lora_sd.ui.train import further
from lora_sd.ui.train.form import TrainForm, choices_of_sets
from lora_sd.ui.train.handlers import CARD, SUBJECT, TrainHandlers
from lora_sd.ui.train.plan_view import plan_html
from lora_sd.ui.train.run_handlers import submitted_sentence
from lora_sd.ui.train.run_panel import RunPanel

QUICK: dict[str, Any] = {"show_progress": "hidden", "queue": False}
LAST: dict[str, Any] = {**QUICK, "trigger_mode": "always_last"}
SETS = ("data.folder", further.MORE, further.VALIDATION, further.REGULARISATION)
OF_A_RECIPE = (
    "data.folder", further.MORE, "data.trigger_word", "data.caption", "base.model", SUBJECT, CARD,
)  # fmt: skip
"""What the recipe and the sample prompts follow."""
OF_TOTALS = (
    "data.folder", further.MORE, "train.steps", "train.batch_size", "train.gradient_accumulation",
)  # fmt: skip
_PROGRESS = gr.Progress()


def wire_train_form(
    form: TrainForm, panel: RunPanel, handlers: TrainHandlers
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let the form follow what is chosen, outlive a reload, be planned, and start runs; arguments
    of the events for when the page is loaded, and for when the tab is opened."""
    parts = form.fields
    names = {part: name for name, part in parts.items()}
    everything = {*parts.values()}
    first = {name: part.value for name, part in parts.items()}
    differing = gr.Number(0, visible=False)  # fields that the kept form has otherwise

    def sent(data: dict[Component, Any]) -> dict[str, Any]:
        return {names[part]: value for part, value in data.items() if part in names}

    _wire_recipe(form, handlers, sent)
    _wire_plan(form, handlers, sent)

    def choices() -> dict[str, list[Any]]:
        offered, models = handlers.folders(), handlers.place.models
        return {
            **{name: choices_of_sets(offered, name) for name in SETS},
            "base.model": [(base.label, base.id) for base in offered_bases(models)],
            "base.vae": [(say("train.own_vae"), ""), *offered_vaes(models)],
        }

    def open_tab() -> list[Any]:
        return [gr.update(choices=offers) for offers in choices().values()]

    def differences(kept: object) -> dict[str, Any]:
        restored = handlers.restored(kept)
        return {name: value for name, value in restored.items() if value != first[name]}

    def restore(kept: object) -> dict[Any, Any]:
        return {parts[name]: gr.update(value=value) for name, value in differences(kept).items()}

    def load(kept: object, set_to: object) -> dict[Any, Any]:
        changed = differences(kept)
        whole = first | changed
        offered = {
            parts[name]: gr.update(choices=offers, value=whole[name])
            for name, offers in choices().items()
        }
        return {
            **offered,
            differing: len(changed),
            **look(whole["data.folder"], whole["data.masks"]),
            form.recipe_note: _list(handlers.follow(whole, set_to).reasons),
            form.totals: _hint(handlers.totals(whole)),
        }

    def look(folder_id: object, masks: object) -> dict[Any, Any]:
        shown = handlers.show_folder(folder_id)
        return {
            form.thumbs: sentences_html(shown.problems) + thumbs_html(shown.pairs),
            form.mask_note: _note(handlers.mask_note(folder_id, masks)),
        }

    def press_start(data: dict[Component, Any]) -> dict[Any, Any]:
        started = handlers.start(sent(data))
        updates: dict[Any, Any] = _marked(form, started.by_field, data[form.wrong])
        updates[form.problems] = _problems(started.by_field, started.problems)
        if started.submitted:
            name = parts["output.name"]
            updates[name] = {**updates.get(name, {}), **gr.update(value="")}
            said = submitted_sentence(started.submitted)
            updates[panel.said] = (
                f'<p class="hint" role="status">{escape(said)}</p>' if said else ""
            )
            if not started.submitted.place:
                updates[panel.run] = gr.update(value=started.submitted.run)
        return updates

    parts["data.folder"].change(
        look,
        [parts["data.folder"], parts["data.masks"]],
        [form.thumbs, form.mask_note],
        show_progress="hidden",
        concurrency_id="look",
    )
    parts["data.masks"].change(
        lambda folder_id, masks: _note(handlers.mask_note(folder_id, masks)),
        [parts["data.folder"], parts["data.masks"]],
        form.mask_note,
        **QUICK,
    )
    gr.on(
        _changes(form, OF_TOTALS),
        lambda data: _hint(handlers.totals(sent(data))),
        {parts[name] for name in OF_TOTALS},
        form.totals,
        **LAST,
    )
    # In the browser alone: nothing is sent.
    gr.on(
        _changes(form, parts),
        None,
        [*parts.values()],
        form.kept,
        js=f"(...values) => Object.fromEntries({json.dumps([*parts])}"
        ".map((name, number) => [name, values[number]]))",
        show_progress="hidden",
    )
    form.start.click(
        press_start,
        {*everything, form.wrong},
        [
            *(form.problems, panel.said, panel.run, form.wrong, form.more),
            *parts.values(),
            *dict.fromkeys(form.folds.values()),
        ],
        concurrency_id="trainer",
        concurrency_limit=1,
        show_progress="hidden",
    ).then(**panel.refresh)
    differing.change(restore, form.kept, [*parts.values()], **QUICK)
    offers = [parts[name] for name in (*SETS, "base.model", "base.vae")]
    loaded = {
        "fn": load,
        "inputs": [form.kept, form.set_to],
        "outputs": [
            *(*offers, differing),
            *(form.thumbs, form.mask_note, form.recipe_note, form.totals),
        ],
        **QUICK,
    }
    return loaded, {"fn": open_tab, "inputs": None, "outputs": offers, **QUICK}


def _wire_recipe(form: TrainForm, handlers: TrainHandlers, sent: Any) -> None:
    parts = form.fields

    def follow(data: dict[Component, Any], all_of_it: bool = False) -> dict[Any, Any]:
        followed = handlers.follow(sent(data), data[form.set_to], all_of_it)
        updates = {parts[name]: gr.update(value=v) for name, v in followed.updates.items()}
        return {**updates, form.set_to: followed.shown, form.recipe_note: _list(followed.reasons)}

    given = {*parts.values(), form.set_to}
    result = [*parts.values(), form.set_to, form.recipe_note]
    gr.on(_changes(form, OF_A_RECIPE), lambda data: follow(data), given, result, **LAST)
    form.reset.click(lambda data: follow(data, all_of_it=True), given, result, **QUICK)


def _wire_plan(form: TrainForm, handlers: TrainHandlers, sent: Any) -> None:
    cancelling = Cancelling()

    def press(
        data: dict[Component, Any], request: gr.Request, progress: gr.Progress = _PROGRESS
    ) -> str:
        page = page_of(request)
        cancelling.begin(page)

        def wait(seconds: float) -> bool:
            progress(0, desc=say("train.plan.working", seconds=seconds))
            return cancelling.is_cancelled(page)

        return plan_html(handlers.plan(sent(data), wait))

    def cancel(request: gr.Request) -> None:
        cancelling.cancel(page_of(request))

    form.make_plan.click(lambda: gr.update(visible=True), None, form.cancel_plan, **QUICK).then(
        press,
        {*form.fields.values()},
        form.plan,
        concurrency_id="plan",
        concurrency_limit=1,
    ).then(lambda: gr.update(visible=False), None, form.cancel_plan, **QUICK)
    form.cancel_plan.click(cancel, None, None, **QUICK)


def _changes(form: TrainForm, names: Any) -> list[Any]:
    return [form.fields[name].change for name in names]


def _marked(form: TrainForm, wrong: Any, before: Any) -> dict[Any, Any]:
    """Updates that put each sentence beside its field, and take away those of the last press."""
    updates: dict[Any, Any] = {form.wrong: [*wrong]}
    for name in {*before} - {*wrong}:
        updates[form.fields[name]] = gr.update(info=fields.help_text(name), elem_classes=[])
    for name, sentence in wrong.items():
        updates[form.fields[name]] = gr.update(
            info=fields.as_plain(sentence), elem_classes=["wrong"]
        )
        if name in form.folds:
            updates[form.more] = gr.update(open=True)
            updates[form.folds[name]] = gr.update(open=True)
    return updates


def _problems(by_field: Any, others: Sequence[str]) -> str:
    """What is wrong, above Start: the fields by name, whose sentences are beside them."""
    links = ", ".join(
        f'<a href="#{name.replace(".", "-")}">{escape(fields.label(name))}</a>' for name in by_field
    )
    items = sentences_html(others)
    if not links:
        return items
    said = say("train.mend", fields=links)
    return f'<div class="problems" role="alert"><p>{said}</p></div>{items}'


def _list(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<ul class="reasons" aria-live="polite">{items}</ul>'


def _hint(sentence: str) -> str:
    return f'<p class="hint">{escape(sentence)}</p>'


def _note(sentence: str) -> dict[str, Any]:
    """A sentence in small print; without one, nothing."""
    return gr.update(value=_hint(sentence), visible=bool(sentence))
