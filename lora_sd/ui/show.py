"""Small pieces of HTML, and pictures made large enough to look at."""

import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from textwrap import dedent

from PIL import Image

from lora_sd.ui import fields
from lora_sd.ui.data.look import small, source_of
from lora_sd.ui.data.pictures import PREVIEWS, counted
from lora_sd.ui.texts import say

SHOWN_PX = 512
_WORD = r"""(?:'[^']*'|"[^"]*"|[^\s'"])+"""  # of a command line
_NEW = rf"""{_WORD}(?:(?<=\.safetensors)|(?<=\.safetensors['"]))(?!\S)"""
COMMAND = re.compile(rf"""python -c "[^"]+"(?: {_WORD} {_NEW})+""")
"""As base_files.pickles gives it: a program, then pairs of an old file and a new one."""


def enlarged(picture: Image.Image) -> Image.Image:
    """A small picture several times as large, smooth; a large one as it is."""
    factor = math.ceil(SHOWN_PX / max(picture.size))
    if factor <= 1:
        return picture
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.LANCZOS)


def sentence_html(text: str) -> str:
    """Text with the command that it tells to run, if any, on a line of its own to be copied."""
    found = COMMAND.search(text)
    if not found:
        return escape(text)
    title = escape(say("show.select_all"))
    command = f'<code class="command" title="{title}">{escape(found[0])}</code>'
    return escape(text[: found.start()]) + command + escape(text[found.end() :])


def sentences_html(problems: Sequence[str]) -> str:
    """Problems as a box; an empty text for none."""
    if not problems:
        return ""
    items = "".join(f"<li>{sentence_html(problem)}</li>" for problem in problems)
    return f'<ul class="problems" role="alert">{items}</ul>'


def thumbs_html(pairs: Sequence[tuple[Path, str]]) -> str:
    """The first pictures of a data set, and how many pictures and captions there are."""
    if not pairs:
        return ""
    items = []
    for file, caption in pairs[:PREVIEWS]:
        picture = small(file)
        shown = (
            f'<img src="{source_of(picture.jpeg)}" alt="">'
            if picture.jpeg
            else f"<i>{escape(say('show.unreadable'))}</i>"
        )
        words = escape(caption) if caption else f"<em>{escape(say('show.no_caption'))}</em>"
        items.append(f'<li title="{escape(caption)}">{shown}<span>{words}</span></li>')
    pictures, bare = counted(len(pairs)), sum(not caption for _, caption in pairs)
    key = f"show.uncaptioned.{'one' if bare == 1 else 'many'}" if bare else "show.all_captioned"
    said = [say(key, pictures=pictures, count=bare, field=fields.label("data.caption"))]
    if len(pairs) > PREVIEWS:
        said.append(say("show.first_shown", count=PREVIEWS))
    return f'<ul class="thumbs">{"".join(items)}</ul><p class="hint">{escape(" ".join(said))}</p>'


def layers_html(table: str, notices: Sequence[str]) -> str:
    """The chosen layers as lines of text, and what is to be known of them; empty for none."""
    if not table:
        return ""
    said = "".join(f'<p class="hint">{escape(notice)}</p>' for notice in notices)
    return f'<pre class="layers" tabindex="0">{escape(dedent(table))}</pre>{said}'
