"""The pictures of a data set as HTML: cards to write captions on, one picture large, tags."""

import io
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from lora_sd.data.buckets import Crop
from lora_sd.data.images import UnreadableImage, read_image
from lora_sd.ui.data.look import Card, source_of
from lora_sd.ui.texts import say

MOST_TAGS = 200
LARGE_PX = 1024
AROUND = 40  # characters on either side of a change


def cards_html(data_set: str, base: str, shown: Sequence[Card], editable: bool) -> str:
    """A page of pictures, each with its caption."""
    items = "".join(card_html(one, editable) for one in shown)
    return (
        f'<ul class="cards" data-set="{escape(data_set)}" data-base="{escape(base)}">{items}</ul>'
        '<dialog class="large"></dialog>'
    )


def card_html(one: Card, editable: bool) -> str:
    """One picture: its crop, its sizes, its caption."""
    name = escape(one.picture.name)
    label = escape(say("data.card.look", name=one.picture.name))
    drawn = _drawing(one, one.small.jpeg) if one.small.jpeg else f"<i>{say('data.card.none')}</i>"
    caption = (
        f'<textarea rows="3" {"" if editable else "readonly"} spellcheck="true" '
        f'aria-label="{escape(say("data.card.caption", name=one.picture.name))}" '
        f'placeholder="{escape(say("data.card.placeholder"))}">{escape(one.picture.lines)}'
        "</textarea>"
    )
    remove = (
        f'<button type="button" class="remove" aria-label="'
        f'{escape(say("data.card.remove_one", name=one.picture.name))}">'
        f"{escape(say('data.card.remove'))}</button>"
    )
    return (
        f'<li data-name="{name}">'
        f'<button type="button" class="look" aria-label="{label}">{drawn}</button>'
        f'<p class="name"><b title="{name}">{name}</b>{remove if editable else ""}</p>'
        f'{caption}<div class="told" role="status">{told_html(one)}</div></li>'
    )


def told_html(one: Card, cut: bool = True) -> str:
    """What is said below a caption: sizes, tokens, and what is wrong.

    Args:
        cut: whether to repeat what of the caption is not read.
    """
    said = []
    if one.crops:
        sizes = ", ".join(dict.fromkeys("{} x {}".format(*crop.size_px) for crop in one.crops))
        said.append(say("data.card.size", size=sizes, kept=one.kept))
    said.append(_counted("data.card.tokens", one.tokens))
    if one.picture.has_mask:
        said.append(say("data.card.mask"))
    lines = [f"<p>{escape(' · '.join(said))}</p>"]
    if cut and one.cut_at is not None:
        lost = one.caption[one.cut_at :]
        lines.append(f'<p class="cut">{escape(say("data.card.cut"))} <del>{escape(lost)}</del></p>')
    if one.problem:
        lines.append(f'<p class="wrong">{escape(say("data.card.problem", why=one.problem))}</p>')
    return "".join(lines)


def large_html(one: Card, file: Path) -> str:
    """One picture as large as fits, with its crop, and its caption as it is read."""
    try:
        picture = read_image(file)
    except UnreadableImage as error:
        drawn = f'<p class="wrong">{escape(say("data.card.problem", why=str(error)))}</p>'
    else:
        picture.thumbnail((LARGE_PX, LARGE_PX), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=85)
        drawn = _drawing(one, buffer.getvalue())
    read = one.caption[: one.cut_at]
    lost = f"<del>{escape(one.caption[one.cut_at :])}</del>" if one.cut_at is not None else ""
    caption = f"<bdi>{escape(read)}{lost}</bdi>" if one.caption else say("data.large.bare")
    source = say("data.large.source", source=one.picture.source) if one.picture.source else ""
    own = say("data.large.size", width=one.small.size_px[0], height=one.small.size_px[1])
    return closable_html(
        f"<figure>{drawn}</figure><p>{escape(own)}</p>{told_html(one, cut=False)}"
        f'<p class="whole">{caption}</p><p class="hint">{escape(source)}</p>',
        one.picture.name,
    )


def closable_html(inside: str, title: str = "") -> str:
    """The inside of a dialog, with what closes it."""
    return (
        f'<form method="dialog"><header><h3>{escape(title)}</h3>'
        f"<button>{escape(say('data.large.close'))}</button></header></form>{inside}"
    )


def tags_html(counts: Sequence[tuple[str, int]]) -> str:
    """The tags of all captions, most frequent first; a press on one finds its pictures."""
    if not counts:
        return f'<p class="hint">{escape(say("data.tags.none"))}</p>'
    items = "".join(
        f'<li><button type="button" data-tag="{escape(tag)}">{escape(tag)} <b>{n:,}</b></button>'
        "</li>"
        for tag, n in counts[:MOST_TAGS]
    )
    rest = len(counts) - MOST_TAGS
    more = f'<p class="hint">{escape(say("data.tags.more", count=rest))}</p>' if rest > 0 else ""
    return f'<ul class="tags">{items}</ul>{more}'


def changes_html(changes: Sequence[tuple[str, str, str]], most: int, sentence: str) -> str:
    """What a bulk edit would do: (name, caption before, after) of the first pictures."""
    items = "".join(
        f"<li><b>{escape(name)}</b><span>{_difference(before, after)}</span></li>"
        for name, before, after in changes[:most]
    )
    shown = f'<ul class="changes">{items}</ul>' if items else ""
    return f'<p class="hint">{escape(sentence)}</p>{shown}'


def _difference(before: str, after: str) -> str:
    """What goes and what comes, with a few words around it."""
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    gone, new = before[start : len(before) - end], after[start : len(after) - end]
    left, right = before[:start], before[len(before) - end :]
    left = "…" + left[-AROUND:] if len(left) > AROUND else left
    right = right[:AROUND] + "…" if len(right) > AROUND else right
    marked = (f"<del>{escape(gone)}</del>" if gone else "") + (
        f"<ins>{escape(new)}</ins>" if new else ""
    )
    return f"{escape(left)}{marked}{escape(right)}"


def _drawing(one: Card, jpeg: bytes) -> str:
    """A picture with what is cut off it darkened, in its own pixels."""
    width, height = one.small.size_px
    frames = "".join(_frame(crop, width, height) for crop in one.crops)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(one.picture.name)}">'
        f'<image href="{source_of(jpeg)}" width="{width}" height="{height}" '
        'preserveAspectRatio="none"/>'
        f"{frames}</svg>"
    )


def _frame(crop: Crop, width: int, height: int) -> str:
    left, top, right, bottom = crop.box
    if (left, top, right, bottom) == (0, 0, width, height):
        return ""
    outside = f"M0 0H{width}V{height}H0ZM{left:g} {top:g}V{bottom:g}H{right:g}V{top:g}Z"
    return (
        f'<path class="outside" d="{outside}"/><rect class="frame" x="{left:g}" y="{top:g}" '
        f'width="{right - left:g}" height="{bottom - top:g}"/>'
    )


def _counted(key: str, count: int) -> str:
    return say(f"{key}.{'one' if count == 1 else 'many'}", count=count)
