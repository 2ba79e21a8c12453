"""The Compare tab's layout and its wiring: two runs, chosen above, and all of them below."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr
from PIL import Image

from lora_sd.ui.compare.handlers import Compared, CompareHandlers, Row, SamePictures
from lora_sd.ui.curves import loss_curve, rate_curve, validation_curve
from lora_sd.ui.sample_parts import build_gallery, build_step_slider
from lora_sd.ui.samples import shown_picture, slider
from lora_sd.ui.show import sentences_html
from lora_sd.ui.texts import say

LOOK_EVERY_S = 2.0


@dataclass(frozen=True)
class CompareTab:
    """What other parts of the page need of this tab.

    Attributes:
        chosen: the two runs.
        opened: arguments of the event that offers the runs there are, and then of `refresh`.
        refresh: arguments of the event that reads both runs anew.
        choose: arguments of the event that chooses a run, whose inputs are that run and `chosen`.
    """

    chosen: list[gr.Dropdown]
    opened: dict[str, Any]
    refresh: dict[str, Any]
    choose: dict[str, Any]


def build_compare_tab(handlers: CompareHandlers) -> CompareTab:
    """Lay out the tab inside the current Blocks."""
    with gr.Row(elem_classes="compare-runs"):
        one = gr.Dropdown(
            [], label=say("compare.one"), allow_custom_value=True, elem_id="compare-one"
        )
        other = gr.Dropdown(
            [], label=say("compare.other"), allow_custom_value=True, elem_id="compare-other"
        )
    problems = gr.HTML(elem_id="compare-problems")
    curves = gr.HTML(elem_id="compare-curves")
    pictures_title = gr.HTML(elem_id="compare-pictures-title", elem_classes="part-title")
    pictures = build_gallery("compare-pictures", columns=6)
    step = build_step_slider("compare-step")
    results = gr.HTML(elem_id="compare-results")
    settings = gr.HTML(elem_id="compare-settings")
    shown = gr.State({})
    wanted = gr.State(None)  # the step that was chosen by hand
    timer = gr.Timer(LOOK_EVERY_S, active=False)
    parts = {
        "problems": problems, "curves": curves, "pictures_title": pictures_title,
        "pictures": pictures, "step": step, "results": results, "settings": settings,
        "timer": timer,
    }  # fmt: skip

    def fill(data: dict[Any, Any]) -> dict[Any, Any]:
        before = data[shown]
        found = handlers.compare(data[one], data[other], data[wanted])
        updates, now = changes(found, before)
        if now == before:
            return gr.skip()
        return {parts[name]: update for name, update in updates.items()} | {shown: now}

    def choices(first: object, second: object) -> tuple[Any, Any]:
        names, chosen = handlers.names(), handlers.choice(first, second)
        return gr.update(choices=names, value=chosen[0]), gr.update(choices=names, value=chosen[1])

    def choose(run: object, first: object, second: object) -> tuple[Any, Any]:
        return choices(run, first if first != run else second)

    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False}
    filling: dict[str, Any] = {
        "fn": fill,
        "inputs": {one, other, wanted, shown},
        "outputs": [*parts.values(), shown],
        "concurrency_id": "compare",
        "show_progress": "hidden",
    }
    gr.on([one.change, other.change], trigger_mode="always_last", **filling)
    step.input(
        lambda step, seen: None if step == seen.get("newest") else step,
        [step, shown],
        wanted,
        trigger_mode="always_last",
        **quiet,
    ).then(**filling)
    timer.tick(trigger_mode="once", **filling)
    return CompareTab(
        chosen=[one, other],
        opened={"fn": choices, "inputs": [one, other], "outputs": [one, other], **quiet},
        refresh=filling,
        choose={"fn": choose, "outputs": [one, other], **quiet},
    )


def changes(found: Compared, before: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(updates, stamps) of the parts that changed since `before`."""
    same = found.pictures
    drawn = [(run.name, run.course.step, run.steps) for run in found.drawn]
    now: dict[str, Any] = {
        "newest": same.steps[-1] if same.steps else None,
        "problems": found.problems,
        "curves": drawn,
        "pictures_title": (found.names, same.step, same.notice),
        "pictures": (found.names, [(a.stamp(), b.stamp()) for a, b in same.pairs]),
        "step": (same.steps, same.step),
        "results": found.results,
        "settings": (found.names, found.settings),
        "timer": found.at_work,
    }
    updates: dict[str, Any] = {}
    for name, stamp in now.items():
        if name == "newest" or before.get(name) == stamp:
            continue
        try:
            updates[name] = _update(name, found)
        except (OSError, SyntaxError):  # a picture that is still being written: next time
            now[name] = before.get(name)
    return updates, now


def _update(name: str, found: Compared) -> Any:
    same = found.pictures
    match name:
        case "problems":
            return sentences_html(found.problems)
        case "curves":
            return _curves_html(found)
        case "pictures_title":
            return _title_html(found.names, same) if found.drawn else ""
        case "pictures":
            return gr.update(
                value=_cells(found.names, same),
                columns=6 if same.has_base else 4,  # two prompts a row; one on a phone
                visible=bool(same.pairs),
            )
        case "step":
            return gr.update(value=same.step, visible=len(same.steps) > 1, **slider(same.steps))
        case "results":
            return _table_html(say("compare.results"), found.names, found.results)
        case "settings":
            if found.drawn and not found.settings:
                return f'<p class="hint">{say("compare.no_differences")}</p>'
            return _table_html(say("compare.settings"), found.names, found.settings)
        case _:
            return gr.Timer(active=found.at_work)


def _curves_html(found: Compared) -> str:
    if not found.drawn:
        return ""
    small = rate_curve(found.drawn)
    if any(run.course.validated.losses for run in found.drawn):
        small = validation_curve(found.drawn) + small
    return f'<div class="all">{loss_curve(found.drawn)}<div class="small">{small}</div></div>'


def _title_html(names: tuple[str, str], same: SamePictures) -> str:
    if same.notice:
        return f'<p class="hint">{escape(same.notice)}</p>'
    title = say("compare.pictures", one=names[0], other=names[1], step=same.step)
    return f"<h3>{escape(title)}</h3>"


def _cells(names: tuple[str, str], same: SamePictures) -> list[tuple[Image.Image, str]]:
    """The pictures of each prompt side by side, with what they show."""
    cells = []
    for pair in same.pairs:
        if same.has_base and (base := pair[0].base):
            text = say("run.base_picture", prompt=pair[0].prompt)
            cells.append((shown_picture(base), text))
        for name, sample in zip(names, pair, strict=True):
            text = say("compare.picture", run=name, prompt=sample.prompt)
            cells.append((shown_picture(sample.file), text))
    return cells


def _table_html(title: str, names: tuple[str, str], rows: list[Row]) -> str:
    if not rows:
        return ""
    head = "".join(
        f'<th scope="col"><span class="key of-{place}">{escape(name)}</span></th>'
        for place, name in enumerate(names)
    )
    body = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th><td>{escape(row.one)}</td>'
        f"<td>{escape(row.other)}</td></tr>"
        for row in rows
    )
    return (
        f'<table class="compared"><thead><tr><th scope="col">{escape(title)}</th>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table>"
    )
