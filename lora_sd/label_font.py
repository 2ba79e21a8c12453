"""A font for the words on a picture: prompts are written in any language."""

import string
from collections.abc import Iterable

from PIL import ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
# Pillow looks for them where the system keeps its fonts.
WITH_MORE_LETTERS = (
    "DejaVuSans.ttf",
    "NotoSansCJK-Regular.ttc",
    "SourceHanSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",  # Windows
    "malgun.ttf",
    "PingFang.ttc",  # macOS
    "Hiragino Sans GB.ttc",
    "STHeiti Medium.ttc",
    "Arial Unicode.ttf",
    "unifont.otf",
)
NO_CHARACTER = "\U0010ffff"


def label_font(texts: Iterable[str], size_px: int) -> Font:
    """Pillow's own font, or where that lacks letters, the system's font that lacks the fewest."""
    letters = {letter for text in texts for letter in text if not letter.isspace()}
    best = ImageFont.load_default(size_px)
    least = len(lacking(best, letters))
    for name in WITH_MORE_LETTERS:
        if not least:
            break
        try:
            font = _of_the_system(name, size_px)
        except OSError:  # this system has none of that name
            continue
        if (missing := len(lacking(font, letters))) < least:
            best, least = font, missing
    return best


def lacking(font: Font, letters: Iterable[str]) -> set[str]:
    """Those that the font draws as the box which stands for any letter it lacks."""
    box = _drawn(font, NO_CHARACTER)
    return {letter for letter in letters if _drawn(font, letter) == box}


def readable(label: str, font: Font, otherwise: str = "") -> str:
    """The label; where the font lacks some of it, another one, or what it has of this."""
    missing = lacking(font, set(label) - set(string.whitespace))
    if not missing:
        return label
    return otherwise or "".join(letter for letter in label if letter not in missing).strip()


def _of_the_system(name: str, size_px: int) -> Font:
    return ImageFont.truetype(name, size_px)


def _drawn(font: Font, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
