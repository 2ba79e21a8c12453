"""The data report in the page's words, and the whole of it as a file."""

import dataclasses
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from lora_sd.config import Config
from lora_sd.data.report.facts import Report
from lora_sd.data.report.html import page, piece
from lora_sd.ui import fields
from lora_sd.ui.data.pictures import Cancelled, OnFile, PictureFolder
from lora_sd.verbs.check_data import check

MOST_DRAWN = 60


@dataclass(frozen=True)
class Checked:
    """A report's HTML for the page and the file that holds the whole, or sentences that say why
    there is none."""

    html: str = ""
    file: Path | None = None
    problems: list[str] = field(default_factory=list)


def check_folder(folder: PictureFolder, settings: Config, on_picture: OnFile) -> Checked:
    """The report on a folder of pictures; of its path it says the name alone.

    Raises:
        Cancelled: `on_picture` returned True.
        UserError: no report can be made.
    """
    data = settings.data.model_copy(update={"folder": str(folder.path), "folders": []})
    cancelled = False

    def advance(done: int, of: int) -> bool:
        nonlocal cancelled
        cancelled = cancelled or on_picture(done, of)
        return cancelled

    report = check(settings.model_copy(update={"data": data}), advance)
    if cancelled:
        raise Cancelled

    def told_here(sentences: tuple[str, ...]) -> tuple[str, ...]:
        shown = (one.replace(str(folder.path), folder.path.name) for one in sentences)
        return tuple(map(fields.in_page_words, shown))

    told = dataclasses.replace(
        report, advice=told_here(report.advice), notices=told_here(report.notices)
    )
    return Checked(piece(told, MOST_DRAWN), _file(told, folder.path.name))


def _file(report: Report, name: str) -> Path:
    """The whole report as a file that the browser may fetch."""
    html = page(report)
    key = hashlib.sha256(html.encode()).hexdigest()[:24]
    # Only what lies in Gradio's own folder can be fetched; it is cleaned after a day.
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "downloads" / key
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-pictures.html"
    file.write_text(html, encoding="utf-8")
    return file
