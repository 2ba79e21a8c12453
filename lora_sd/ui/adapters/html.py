"""The Adapters tab's cards and results as HTML."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from lora_sd.errors import shown_size
from lora_sd.ui import fields
from lora_sd.ui.adapters.cards import Card
from lora_sd.ui.adapters.handlers import CardList, Chosen
from lora_sd.ui.adapters.tools import BakedModel, Compared, Made
from lora_sd.ui.curves import small_curve
from lora_sd.ui.show import sentence_html
from lora_sd.ui.texts import say

if TYPE_CHECKING:
    from lora_sd.verbs.inspect import Inspection
    from lora_sd.verify import Report

WIDEST_VALUE = 300
MOST_SETTINGS = 60
MARK = (  # where there is no picture: the two factors of a low-rank matrix
    '<svg viewBox="0 0 32 32" aria-hidden="true"><rect x="8" y="6" width="5" height="15" rx="1"/>'
    '<rect x="8" y="22" width="16" height="5" rx="1"/></svg>'
)


def cards_html(found: CardList, chosen: str, searched: bool) -> str:
    """The cards as buttons, the chosen one pressed."""
    if not found.cards:
        head, words = ("no_match", "no_match_help") if searched else ("nothing", "nothing_help")
        return (
            f'<section class="empty"><h3>{escape(say(f"adapters.{head}"))}</h3>'
            f"<p>{escape(say(f'adapters.{words}'))}</p></section>"
        )
    cards = "".join(_card(card, card.id == chosen) for card in found.cards)
    more = say("adapters.more", count=found.more) if found.more else ""
    return f'<ul class="adapter-list">{cards}</ul>' + (
        f'<p class="hint">{more}</p>' if more else ""
    )


def _card(card: Card, pressed: bool) -> str:
    facts = card.facts
    line = [
        facts.base,
        say("adapters.rank_is", rank=facts.rank) if facts.rank else "",
        shown_size(card.file_bytes) if card.file_bytes else "",
        facts.date,
    ]
    trigger = f'<span class="trigger">{escape(facts.trigger)}</span>' if facts.trigger else ""
    kind = say("adapters.run") if card.is_run else say("adapters.file")
    none = "" if card.versions else f'<span class="none">{escape(say("adapters.none_yet"))}</span>'
    return (
        f'<li><button type="button" class="adapter-card" data-id="{escape(card.id)}" '
        f'aria-pressed="{str(pressed).lower()}">{_thumbnail(card)}'
        f'<span class="words"><span class="name"><b>{escape(card.name)}</b><small>{escape(kind)}'
        f"</small></span>{trigger}{none}"
        f'<span class="line">{escape(" · ".join(filter(None, line)))}</span></span>'
        f"{small_curve(facts.losses)}</button></li>"
    )


def _thumbnail(card: Card) -> str:
    if not card.facts.thumbnail:
        return f'<span class="thumbnail">{MARK}</span>'
    words = say("adapters.sample_of", name=card.name)
    return (
        f'<span class="thumbnail"><img src="{escape(card.facts.thumbnail)}" '
        f'alt="{escape(words)}"></span>'
    )


def chosen_html(chosen: Chosen) -> str:
    """The chosen card, large."""
    card, facts = chosen.card, chosen.card.facts
    named = [
        ("trigger", facts.trigger),
        ("base", facts.base),
        ("rank", facts.rank),
        ("size", shown_size(card.file_bytes) if card.file_bytes else ""),
        ("date", facts.date),
    ]
    shown = "".join(
        f"<div><dt>{escape(say(f'adapters.{key}'))}</dt><dd>{escape(value)}</dd></div>"
        for key, value in named
        if value
    )
    said = facts.problem or ("" if card.versions else say("adapters.none_yet_help"))
    hint = f'<p class="hint">{escape(said)}</p>' if said else ""
    return (
        f'<section class="chosen-card">{_thumbnail(card)}<div><h3>{escape(card.name)}</h3>'
        f"<dl>{shown}</dl>{hint}</div></section>"
    )


def inspection_html(found: "Inspection") -> str:
    """Numbers by block, and the metadata."""
    from lora_sd.algebra.spectrum import Group, by_block, by_kind, span
    from lora_sd.verbs.inspect import metadata_lines

    kinds = by_kind(found.facts)
    total = sum(group.energy for group in kinds) or 1.0
    with_base = all(group.relative_norm is not None for group in kinds)
    head = ["block", "layers", "rank", "norm", *(["of_base"] if with_base else [])]
    head += ["energy", "effective", "rank_95"]

    def row(name: str, group: Group) -> list[str]:
        share = 100 * group.energy / total
        return [
            escape(name),
            str(len(group.layers)),
            escape(group.ranks),
            f"{group.norm:.3g}",
            *([f"{group.relative_norm:.2g}"] if with_base else []),
            f'<span class="share"><i style="width:{share:.1f}%"></i>{share:.1f} %</span>',
            f"{group.mean(lambda layer: layer.effective_rank):.1f}",
            f"{group.mean(lambda layer: layer.rank_for_most):.1f}",
        ]

    rows = [row(group.name, group) for group in by_block(found.facts)]
    sums = [row(say("adapters.all_of", kind=group.kind), group) for group in kinds]
    facts = [
        ("family", found.family),
        ("layers", f"{len(found.facts):,}"),
        ("rank", span([fact.rank for fact in found.facts])),
        ("numbers", f"{found.parameters:,}"),
        ("format", f"{found.format}, {found.dtype}"),
        ("size", shown_size(found.size_bytes)),
        ("sha256", found.sha256),
    ]
    metadata = [line.partition("  ") for line in metadata_lines(found.metadata)]
    shown = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value.strip()[:WIDEST_VALUE])}</dd></div>"
        for key, _, value in metadata
        if value
    )
    return (
        f"{_facts_html(facts)}{_notices_html(found.notes)}"
        + _table_html([say(f"adapters.column.{name}") for name in head], rows, sums)
        + f'<p class="hint">{escape(say("adapters.columns_help"))}</p>'
        + f'<details class="adapter-metadata"><summary>{escape(say("adapters.metadata"))}</summary>'
        + f"<dl>{shown or escape(say('adapters.no_metadata'))}</dl></details>"
    )


def verified_html(family: str, report: "Report") -> str:
    """What each program makes of the file."""
    from lora_sd.clients.report import TITLES

    good = say("adapters.would_load" if report.by_rules else "adapters.loads")
    rows = [
        (TITLES[name], one.ok, good if one.ok else say("adapters.does_not_load"))
        for name, one in report.clients.items()
    ]
    if report.in_diffusers is not None:
        wrong = bool(report.in_diffusers)
        words = say("adapters.loaded_wrong" if wrong else "adapters.loaded_right")
        rows.append((say("adapters.really_loaded"), not wrong, words))
    items = "".join(
        f'<li class="{"yes" if ok else "no"}"><b>{escape(title)}</b><span>{escape(words)}</span>'
        for title, ok, words in rows
    )
    head = say("adapters.verified", family=family, layers=report.modules)
    return f'<p>{escape(head)}</p><ul class="clients">{items}</ul>{_notices_html(report.lines())}'


def _setting(name: str) -> str:
    """A setting as the Train tab calls it; what other programs wrote stays as it is."""
    return fields.label(name) if name in fields.FIELDS else name


def _value(text: str) -> str:
    return "–" if text in ("", "null") else _short(text)


def compared_html(found: Compared) -> str:
    """How alike two adapters are, by block, and the settings that differ."""
    first, second = found.names
    whole, only = found.similarity.whole, found.similarity.only
    cosine = whole.cosine
    said = [
        say("adapters.cosine_none")
        if cosine is None
        else say("adapters.cosine_is", cosine=cosine, words=_likeness(cosine)),
        say("adapters.norms_are", first=whole.norms[0], second=whole.norms[1]),
        say("adapters.shared", count=whole.shared),
    ]
    said += [
        say("adapters.only_in", count=len(names), name=name)
        for name, names in zip(found.names, only, strict=True)
        if names
    ]
    rows = [
        [
            escape(pair.block if pair.kind == "text encoder" else f"{pair.block} {pair.kind}"),
            str(pair.shared),
            f"{pair.norms[0]:.3g}",
            f"{pair.norms[1]:.3g}",
            "–" if pair.cosine is None else f"{pair.cosine:.3f}",
        ]
        for pair in found.similarity.blocks
    ]
    head = [say(f"adapters.column.{name}") for name in ("block", "layers")]
    head += [
        say("adapters.column.norm_of", name=first),
        say("adapters.column.norm_of", name=second),
        say("adapters.column.cosine"),
    ]
    settings = [
        [escape(_setting(name)), escape(_value(one)), escape(_value(other))]
        for name, one, other in found.settings[:MOST_SETTINGS]
    ]
    below = (
        f"<h4>{escape(say('adapters.settings_differ'))}</h4>"
        + _table_html([say("adapters.column.setting"), first, second], settings, [])
        if settings
        else f'<p class="hint">{escape(say("adapters.settings_same"))}</p>'
    )
    return (
        f"<p>{escape(' '.join(said))}</p>"
        + _table_html(head, rows, [])
        + f'<p class="hint">{escape(say("adapters.cosine_help"))}</p>{below}'
    )


def made_html(made: Made) -> str:
    """What was made, and what is to be known of it."""
    name = made.adapter.file.stem
    words = say("adapters.made", name=name, facts=", ".join(made.facts))
    return f'<p class="done">{escape(words)}</p>{_notices_html(made.notices)}'


def baked_html(made: BakedModel) -> str:
    """Where the model is."""
    words = say("adapters.baked", place=made.place, facts=", ".join(made.facts))
    return f'<p class="done">{escape(words)}</p>{_notices_html(made.notices)}'


def said_html(sentence: str, notices: Sequence[str] = ()) -> str:
    """A sentence on what was done."""
    return f'<p class="done" role="status">{escape(sentence)}</p>{_notices_html(notices)}'


def _likeness(cosine: float) -> str:
    for least, key in ((0.98, "same"), (0.5, "alike"), (0.1, "related"), (-0.1, "unrelated")):
        if cosine >= least:
            return say(f"adapters.likeness.{key}")
    return say("adapters.likeness.opposed")


def _short(value: str) -> str:
    return value if len(value) <= WIDEST_VALUE else f"{value[:WIDEST_VALUE]} …"


def _facts_html(facts: Sequence[tuple[str, str]]) -> str:
    shown = "".join(
        f'<div class="of-{key}"><dt>{escape(say(f"adapters.{key}"))}</dt><dd>{escape(value)}</dd>'
        "</div>"
        for key, value in facts
    )
    return f'<dl class="facts">{shown}</dl>'


def _notices_html(notices: Sequence[str]) -> str:
    items = "".join(f"<li>{sentence_html(notice)}</li>" for notice in notices)
    return f'<ul class="notices">{items}</ul>' if items else ""


def _table_html(
    head: Sequence[str], rows: Sequence[Sequence[str]], sums: Sequence[Sequence[str]]
) -> str:
    """A table whose cells are HTML already; it can be scrolled on a narrow page."""

    def line(row: Sequence[str]) -> str:
        first, *cells = row
        return f'<tr><th scope="row">{first}</th>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'

    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    foot = f"<tfoot>{''.join(map(line, sums))}</tfoot>" if sums else ""
    return (
        f'<div class="adapter-table" tabindex="0"><table><thead><tr>{columns}</tr></thead>'
        f"<tbody>{''.join(map(line, rows))}</tbody>{foot}</table></div>"
    )
