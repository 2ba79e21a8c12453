"""A plan as HTML: figures, graphics cards, layers."""

from html import escape

from lora_sd.errors import shown_size
from lora_sd.ui.show import layers_html, sentences_html
from lora_sd.ui.texts import say
from lora_sd.ui.train.handlers import Planned
from lora_sd.ui.train.plan import RunPlan
from lora_sd.ui.train.run_view import duration


def plan_html(planned: Planned) -> str:
    """The plan, or the sentences that say why there is none."""
    if planned.plan is None:
        return sentences_html(planned.problems)
    plan = planned.plan
    figures = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)} <small>{escape(more)}</small></dd></div>"
        for what, value, more in _figures(plan)
    )
    cards = "".join(
        f'<tr><th scope="row">{escape(say("train.plan.card", gb=gb))}</th>'
        f"<td>{escape(_fit(fits, changes, size))}</td></tr>"
        for gb, fits, changes, size in plan.cards
    )
    notices = "".join(f'<p class="hint">{escape(notice)}</p>' for notice in plan.notices)
    layers = (
        f"<details><summary>{escape(say('train.plan.which_layers'))}</summary>"
        f"{layers_html(planned.layers, planned.notices)}</details>"
        if planned.layers
        else ""
    )
    return (
        f'<section class="plan"><h3>{escape(say("train.plan.title"))}</h3><dl>{figures}</dl>'
        f"<h4>{escape(say('train.plan.cards'))}</h4><table>{cards}</table>{notices}{layers}</section>"
    )


def _figures(plan: RunPlan) -> list[tuple[str, str, str]]:
    """(what, its value, what more is to be said of it)."""
    phase = max(plan.phases, key=lambda one: one[1])[0]
    epochs = ""
    if plan.epochs is not None and plan.pictures is not None:
        epochs = say("train.plan.epochs", epochs=plan.epochs, pictures=plan.pictures)
    time = duration(plan.time_s) if plan.time_s is not None else say("train.plan.no_time")
    return [
        (say("train.plan.time"), time, say(f"train.plan.device_{plan.device}")),
        (
            say("train.plan.memory"),
            shown_size(plan.memory),
            say("train.plan.memory_when", phase=phase),
        ),
        (say("train.plan.seen"), f"{plan.pictures_seen:,}", epochs),
        (
            say("train.plan.file"),
            shown_size(plan.adapter),
            say("train.plan.checkpoint", size=shown_size(plan.checkpoint)),
        ),
        (
            say("train.plan.layers"),
            f"{plan.layers:,}",
            say("train.plan.parameters", parameters=plan.parameters),
        ),
    ]


def _fit(fits: bool, changes: tuple[str, ...], size: int) -> str:
    key = "fits_not" if not fits else "fits_with" if changes else "fits"
    return say(f"train.plan.{key}", size=shown_size(size), changes=" + ".join(changes))
