"""The data report in the Train tab: a button, the report in the page, and the whole as a file."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component

from lora_sd.data.candidates import NO_CAPTION
from lora_sd.data.report.facts import Report
from lora_sd.data.report.html import page, piece
from lora_sd.errors import UserError
from lora_sd.ui import fields
from lora_sd.ui.data import pictures
from lora_sd.ui.show import sentences_html
from lora_sd.ui.train.handlers import TrainHandlers
from lora_sd.verbs.check_data import check

MOST_DRAWN = 60
SAID_ABOVE = "The uploaded files cannot be used yet: what to mend is said beside them, above."
WRITE_CAPTION = "For pictures that have no caption, write one into data.caption, above."
_PROGRESS = gr.Progress()


@dataclass(frozen=True)
class Checked:
    """A report's HTML for the page and the file that holds the whole, or sentences that say why
    there is none."""

    html: str = ""
    file: Path | None = None
    problems: list[str] = field(default_factory=list)


def check_pictures(
    handlers: TrainHandlers,
    form: Mapping[str, Any],
    source: object,
    folder_id: object,
    upload: Mapping[str, Any],
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
) -> Checked:
    """Check the chosen folder, or uploaded pictures as they would be saved.

    Args:
        form: field values by setting.
        source, folder_id, upload: as `TrainHandlers.start` takes them.
    """
    try:
        folder, uploads = handlers.chosen_pictures(source, folder_id, upload)
    except UserError as error:
        if (
            source == "upload"
            and error.problems == handlers.show_upload(upload.get("files")).problems
        ):
            return Checked(problems=[SAID_ABOVE])
        return Checked(problems=error.problems)
    try:
        if folder:
            report = _report(form, folder.path, on_picture)
        else:
            with tempfile.TemporaryDirectory(dir=_fetched_folder()) as place:
                saved = pictures.save_folder(Path(place), "uploaded", uploads)
                report = _report(form, saved.path, on_picture)
    except UserError as error:
        return Checked(problems=[fields.in_page_words(one) for one in error.problems])
    return Checked(piece(report, MOST_DRAWN), _file(report, folder.path.name if folder else ""))


def _report(
    form: Mapping[str, Any], folder: Path, on_picture: Callable[[int, int], bool]
) -> Report:
    """The report in the page's words; of a folder's path it says the name alone."""
    config = fields.config_from_form({**form, "data.folder": str(folder)})
    report = check(config, on_picture)
    advice = list(report.advice)
    if any(NO_CAPTION in one.reason for one in report.unusable):
        advice.insert(0, WRITE_CAPTION)
    return dataclasses.replace(
        report,
        advice=tuple(map(fields.in_page_words, advice)),
        notices=tuple(
            fields.in_page_words(notice).replace(str(folder), folder.name)
            for notice in report.notices
        ),
    )


def _file(report: Report, name: str) -> Path:
    """The whole report as a file that the browser may fetch."""
    html = page(report)
    key = hashlib.sha256(html.encode()).hexdigest()[:24]
    folder = _fetched_folder() / "downloads" / key
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name or 'uploaded'}-pictures.html"
    file.write_text(html, encoding="utf-8")
    return file


def _fetched_folder() -> Path:
    """Gradio's own folder: only what lies there can be fetched; it is cleaned after a day."""
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class DataReportPart:
    """The button and what it fills."""

    button: gr.Button
    shown: gr.HTML
    download: gr.DownloadButton


def build_data_report() -> DataReportPart:
    """Lay out the part inside the current Blocks."""
    button = gr.Button("Check the pictures", size="md", elem_id="check-pictures")
    shown = gr.HTML(elem_id="data-report")
    download = gr.DownloadButton(
        "Download the whole report", size="sm", visible=False, elem_id="report-download"
    )
    return DataReportPart(button, shown, download)


def wire_data_report(
    part: DataReportPart,
    handlers: TrainHandlers,
    form: Mapping[str, Component],
    source: Component,
    folder: Component,
    upload: Mapping[str, Component],
) -> None:
    """Let the button check what is chosen.

    Args:
        form: components by setting.
        upload: components of 'files' and 'captions'.
    """

    def press(data: dict[Component, Any], progress: gr.Progress = _PROGRESS) -> dict[Any, Any]:
        def advance(done: int, of: int) -> bool:
            progress((done, of), desc="checking", unit="pictures")
            return False

        checked = check_pictures(
            handlers,
            {name: data[component] for name, component in form.items()},
            data[source],
            data[folder],
            {name: data[component] for name, component in upload.items()},
            advance,
        )
        panel = (
            '<div class="report-panel" tabindex="0" role="region" aria-label="Report on the '
            f'pictures">{checked.html}</div>'
        )
        return {
            part.shown: sentences_html(checked.problems) + (panel if checked.html else ""),
            part.download: gr.update(visible=bool(checked.file), value=checked.file),
        }

    part.button.click(
        press,
        {*form.values(), source, folder, *upload.values()},
        [part.shown, part.download],
        concurrency_id="check-pictures",
        concurrency_limit=1,
        show_progress_on=part.shown,
    )
