"""The data report as HTML: one file without scripts that fetches nothing, or a piece of a page.

Names and captions come from anywhere, so every text goes through `_text`. A thumbnail is embedded
once, in the contact sheet; other places refer to it.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from lora_sd.data.findings import counted
from lora_sd.data.report.facts import CheckedPicture, CheckedView, Report, shown_number

FIRST_SHOWN = 300
MOST_SHOWN = 1500
MOST_GROUPS = 100
MOST_LEFT_OUT = 500
MOST_TAGS = 40
STYLE, PAGE_STYLE = (
    Path(__file__).with_name(name).read_text(encoding="utf-8")
    for name in ("report.css", "page.css")
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The whole report as a file of its own."""
    title = f"Pictures in {_names(report)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{PAGE_STYLE}{STYLE}</style>\n</head>\n"
        f'<body>\n<main class="data-report">\n<h1>{title}</h1>\n'
        + "\n".join(_sections(report, shown_pictures(report, FIRST_SHOWN, MOST_SHOWN)))
        + "\n</main>\n</body>\n</html>\n"
    )


def piece(report: Report, most: int) -> str:
    """Facts, advice, what is not used, notices, and the contact sheet of the first `most` pictures,
    marked ones first, for another page that brings `STYLE`."""
    numbers = shown_pictures(report, 0, most)
    numbers += [n for n in range(len(report.pictures)) if n not in set(numbers)]
    left_out = f"<h4>Not used</h4>{_left_out(report)}" if report.left_out else ""
    notices = f"<h4>Also</h4>{_list(report.notices)}" if report.notices else ""
    sheet = _contact_sheet(report, sorted(numbers[:most]), links=False)
    inside = f"{_facts(report)}{_advice(report)}{left_out}{notices}<h4>Contact sheet</h4>{sheet}"
    return f'<div class="data-report">{inside}</div>'


def shown_pictures(report: Report, first: int, most: int) -> list[int]:
    """Which pictures are drawn: the first ones, and those with marks (with what they are like), up
    to `most`."""
    numbers = dict.fromkeys(range(min(first, len(report.pictures))))
    for number, one in enumerate(report.pictures):
        if len(numbers) >= most:
            break
        if one.marks:
            numbers |= dict.fromkeys([number, *([one.like] if one.like is not None else [])])
    return sorted(numbers)


def _sections(report: Report, numbers: Sequence[int]) -> Iterable[str]:
    parts = {
        "Contact sheet": _contact_sheet(report, numbers, links=True),
        "Not used": _left_out(report),
        "Alike": _groups(report, set(numbers)),
        "Sizes": _buckets(report),
        "Captions": _captions(report),
        "Also": _list(report.notices) if report.notices else "",
        "Every picture": _table(report, numbers),
    }
    there = {title: inside for title, inside in parts.items() if inside}
    yield _facts(report)
    links = "".join(f'<li><a href="#{_id(title)}">{title}</a></li>' for title in there)
    yield f'<nav aria-label="Parts of this page"><ul>{links}</ul></nav>'
    yield _section("Advice", _advice(report))
    yield from (_section(title, inside) for title, inside in there.items())


def _section(title: str, inside: str) -> str:
    name = _id(title)
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{inside}</section>'


def _id(title: str) -> str:
    return title.lower().replace(" ", "-")


def _facts(report: Report) -> str:
    marked = sum(bool(one.marks) for one in report.pictures)
    facts = [
        (len(report.pictures), "used"),
        (len(report.unusable), "cannot be used"),
        (marked, "stand out"),  # what most pictures have, the advice tells
        (shown_number(report.showings), "shown in an epoch"),
    ]
    items = "".join(f"<div><dt>{what}</dt><dd>{number}</dd></div>" for number, what in facts)
    return f'<dl class="facts">{items}</dl>'


def _advice(report: Report) -> str:
    return _list(report.advice, "advice")


def _left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    items = "".join(
        f"<li><b>{_text(_place(one.file, report))}</b> {_text(one.reason)}</li>"
        for one in report.left_out[:MOST_LEFT_OUT]
    )
    more = len(report.left_out) - MOST_LEFT_OUT
    return f"<ul>{items}</ul>" + (f"<p>... and {more} more; --json names all.</p>" * (more > 0))


def _place(file: Path, report: Report) -> str:
    """Where a file is, inside the one folder where there is but one."""
    folders = set(report.folders)
    if len(folders) == 1 and file.is_relative_to(report.folders[0]):
        return file.relative_to(report.folders[0]).as_posix()
    return str(file)


def _contact_sheet(report: Report, numbers: Sequence[int], links: bool) -> str:
    items = []
    for number in numbers:
        one = report.pictures[number]
        name = f"<b>{_text(one.name)}</b>"
        if links:
            name = f'<a href="#row{number}">{name}</a>'
        sizes = ", ".join(dict.fromkeys(_size(view.crop.size_px) for view in one.views))
        state = "marked" if one.marks else "plain"
        items.append(
            f'<li class="{state}">{_drawing(one, number)}<p>{name}</p><p>{sizes}</p>{_marks(one)}'
            f"</li>"
        )
    left = len(report.pictures) - len(numbers)
    rest = f" {left} of {len(report.pictures)} pictures are not drawn here." if left else ""
    return (
        "<p>The frame is what is shown of each picture; the size below it is what that is scaled "
        f'to.{rest}</p><ul class="sheet">{"".join(items)}</ul>'
    )


def _drawing(one: CheckedPicture, number: int) -> str:
    """The thumbnail with its crops, in the picture's own pixels."""
    width, height = one.size_px
    source = "data:image/jpeg;base64," + base64.b64encode(one.thumbnail).decode("ascii")
    kept = min(view.kept for view in one.views)
    frames = "".join(_frame(view, one.size_px) for view in one.views)
    label = f"{one.name}, {_size(one.size_px)}, {kept:.0%} kept"
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_text(label)}">'
        f'<g id="picture{number}"><image href="{source}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{frames}</g></svg>'
    )


def _frame(view: CheckedView, size_px: tuple[int, int]) -> str:
    left, top, right, bottom = view.crop.box
    width, height = size_px
    outside = f"M0 0H{width}V{height}H0ZM{left:g} {top:g}V{bottom:g}H{right:g}V{top:g}Z"
    # Attributes instead of rules: rules do not reach where a drawing is used again.
    return (
        f'<path d="{outside}" fill="#141210" fill-opacity="0.55" fill-rule="evenodd"/>'
        f'<rect x="{left:g}" y="{top:g}" width="{right - left:g}" height="{bottom - top:g}" '
        f'fill="none" stroke="#e4492e" stroke-width="2.5" vector-effect="non-scaling-stroke"/>'
    )


def _again(report: Report, number: int) -> str:
    """A drawing of the contact sheet once more, small."""
    width, height = report.pictures[number].size_px
    return (
        f'<svg class="small" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<use href="#picture{number}"/></svg>'
    )


def _marks(one: CheckedPicture) -> str:
    items = "".join(f"<li>{_text(mark.text)}</li>" for mark in one.marks)
    return f'<ul class="marks">{items}</ul>' if items else ""


def _groups(report: Report, drawn: set[int]) -> str:
    groups: dict[int, list[int]] = {}
    for number, one in enumerate(report.pictures):
        if one.like is not None:
            groups.setdefault(one.like, [one.like]).append(number)
    if not groups:
        return ""
    items = []
    for members in list(groups.values())[:MOST_GROUPS]:
        pictures = "".join(
            f"<li>{_again(report, n) if n in drawn else ''}{_text(report.pictures[n].name)}</li>"
            for n in members
        )
        items.append(f"<li><ul>{pictures}</ul></li>")
    more = len(groups) - MOST_GROUPS
    rest = f"<p>... and {more} more groups.</p>" if more > 0 else ""
    return (
        "<p>Each line is one group: the same file, or what may be near-duplicates.</p>"
        f'<ol class="groups">{"".join(items)}</ol>{rest}'
    )


def _buckets(report: Report) -> str:
    rows = [
        (_size(one.size_px), str(one.pictures), shown_number(one.showings))
        for one in report.buckets
    ]
    head = ("Size", "Pictures", "Shown in an epoch")
    return _plain_table(head, rows)


def _captions(report: Report) -> str:
    facts = report.captions
    said = []
    if facts.tokens:
        counts = facts.tokens
        said.append(
            f"{counts.fewest} to {counts.most} tokens, half of them {counts.median} or fewer; "
            f"{report.max_tokens} are read."
        )
    if facts.on_every:
        said.append(f"On every picture: {', '.join(facts.on_every[:MOST_TAGS])}.")
    for text, count in facts.same[:5]:
        said.append(f"{count} pictures share the caption '{text}'.")
    if facts.tags_once:
        said.append(f"{counted(facts.tags_once, 'tag')} of one picture alone.")
    tags = [(_text(tag), str(count)) for tag, count in facts.tags[:MOST_TAGS] if count > 1]
    table = _plain_table(("Tag", "Pictures"), tags) if tags else ""
    return _list(said) + table


def _table(report: Report, numbers: Sequence[int]) -> str:
    heads = ("Picture", "Size", "Shown at", "Caption", "Tokens", "In an epoch", "Mask")
    head = "".join(f'<th role="columnheader" scope="col">{name}</th>' for name in heads)
    rows = "".join(_row(report, number, heads) for number in numbers)
    left = len(report.pictures) - len(numbers)
    note = (
        f"<p>The first {FIRST_SHOWN} pictures and those with marks, {MOST_SHOWN} at most; --json "
        f"has all {len(report.pictures)}.</p>"
        if left
        else ""
    )
    return (
        f'{note}<table class="pictures" role="table"><thead role="rowgroup"><tr role="row">{head}'
        f'</tr></thead><tbody role="rowgroup">{rows}</tbody></table>'
    )


def _row(report: Report, number: int, heads: Sequence[str]) -> str:
    one = report.pictures[number]
    shown = "<br>".join(f"{_size(view.crop.size_px)}, {view.kept:.0%} kept" for view in one.views)
    kind = "" if one.kind == "training" else f"<small>{one.kind}</small>"
    cells = [
        f"{_again(report, number)}<b>{_text(one.name)}</b>{kind}{_marks(one)}",
        _size(one.size_px),
        shown,
        f"{_caption(one)}<small>from {_text(one.caption_source)}"
        f"{'; drawn anew each time' if one.varies else ''}</small>",
        str(one.tokens),
        shown_number(one.showings),
        one.mask or "none",
    ]
    inside = "".join(
        f'<td role="cell" data-head="{head}"><div>{cell}</div></td>'
        for head, cell in zip(heads, cells, strict=True)
    )
    return f'<tr role="row" id="row{number}">{inside}</tr>'


def _caption(one: CheckedPicture) -> str:
    if not one.caption:
        return "<i>empty</i>"
    if one.cut_at is None:
        return f"<bdi>{_text(one.caption)}</bdi>"
    read, lost = one.caption[: one.cut_at], one.caption[one.cut_at :]
    return f'<bdi>{_text(read)}<del title="not read">{_text(lost)}</del></bdi>'


def _plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(sentences: Sequence[str], kind: str = "") -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{kind}">{items}</ul>' if kind else f"<ul>{items}</ul>"


def _names(report: Report) -> str:
    return ", ".join(
        _text(f"'{folder.name or folder}'") for folder in dict.fromkeys(report.folders)
    )


def _size(size_px: tuple[int, int]) -> str:
    return f"{size_px[0]} x {size_px[1]}"


def _text(text: str) -> str:
    """Any text as HTML, for elements and quoted attributes. What drives a terminal, turns the
    writing around or is no Unicode is shown as in Python's source; emoji keep their joiners."""
    shown = (c if c.isprintable() or c == "\u200d" else ascii(c)[1:-1] for c in text)
    return escape("".join(shown))
