"""`check-data`: what would become of each picture of a folder, before any training."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_sd import durable
from lora_sd.config import Config, config_from_values, parse_command_line, read_yaml
from lora_sd.data.findings import counted
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.report import as_json, make_report
from lora_sd.data.report.base_facts import base_facts
from lora_sd.data.report.facts import CheckedPicture, Report, shown_number
from lora_sd.errors import EXIT_USER_ERROR, printable, shown_size
from lora_sd.verbs.arguments import add_trainer_settings, check_output

DESCRIPTION = """\
Say what would become of each picture of a folder: its size for training, what is cut off, its
caption and the tokens that are not read; and what to look at first: what cannot be used,
near-duplicates, blurred, small and bordered pictures, captions that have too much or too little in
common. Nothing is trained or changed.

Settings of the trainer may follow: --data.resolution_px 512 --base.model sd15. The base model need
not be on this machine if its family is named: sd15, sd21 or sdxl.

Exit status: 0 everything can be used, 2 something cannot (and data.bad_pictures is not skip)."""
EXAMPLE = """\
  python -m lora_sd check-data pictures/cats --config configs/sd15.yaml -o cats.html
  python -m lora_sd check-data pictures/cats --base.model sdxl --data.resolution_px 1024"""
MOST_ROWS = 100
WIDEST = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="?", metavar="FOLDER", help="the pictures (default: those of the settings)"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as for training")
    parser.add_argument("--json", action="store_true", help="everything as JSON, for programs")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE.html", help="the report to look at"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write the report even if the file exists already"
    )
    add_trainer_settings(parser)


def run(options: argparse.Namespace) -> int:
    if options.output:
        check_output(options.output, options.overwrite, ".html")
    config = _config(options.config, options.folder, options.settings)
    report = _with_bar(config)
    if options.output:
        from lora_sd.data.report.html import page

        durable.write_text(options.output, page(report))
    if options.json:
        print(as_json(report))
    else:
        print("\n".join(lines(report, each_picture=not options.output)))
        if options.output:
            print(f"\n'{options.output}': {shown_size(options.output.stat().st_size)}")
    return EXIT_USER_ERROR if report.unusable and config.data.bad_pictures == "fail" else 0


def check(
    config: Config, on_picture: Callable[[int, int], bool] = lambda done, of: False
) -> Report:
    """The report on a run's pictures; `on_picture` as for `make_report`."""
    base = base_facts(config.base.model)
    folders = [FolderOptions(**one) for one in config.data.folder_options()]
    return make_report(folders, base, config.data.max_tokens, on_picture, config.data.bad_pictures)


def _with_bar(config: Config) -> Report:
    """The report, with a progress bar on stderr where that is a terminal."""
    from tqdm import tqdm

    with tqdm(desc="checking", unit="picture", leave=False, disable=None) as bar:

        def advance(done: int, of: int) -> bool:
            bar.total = of
            bar.update(done - bar.n)
            return False

        return check(config, advance)


def _config(file: Path | None, folder: str | None, settings: Sequence[str]) -> Config:
    line = parse_command_line(settings, "python -m lora_sd check-data")
    values = line.over(read_yaml(file) if file else {})
    if folder is not None:
        data = values.get("data", {})
        values["data"] = {**data, "folder": folder} if isinstance(data, dict) else data
    return config_from_values(values)


def lines(report: Report, each_picture: bool = True) -> list[str]:
    """The report as lines of text; without HTML also the pictures, those with marks first."""
    marked = sum(bool(one.marks) for one in report.pictures)
    said = [
        f"{counted(len(report.pictures))} can be used, {len(report.unusable)} cannot, {marked} to "
        f"look at; {shown_number(report.showings)} shown in an epoch",
        "",
        *(f"- {sentence}" for sentence in report.advice),
    ]
    if report.left_out:
        said += ["", "not used"]
        said += [f"  '{one.file}' {one.reason}" for one in report.left_out[:MOST_ROWS]]
        said += _rest(len(report.left_out) - MOST_ROWS)
    if report.notices:
        said += ["", "also", *(f"  {notice}" for notice in report.notices)]
    said += ["", "pictures of each size"]
    said += [f"  {one.size_px[0]} x {one.size_px[1]}: {one.pictures}" for one in report.buckets]
    if each_picture:
        rows = sorted(report.pictures, key=lambda one: not one.marks)
        kinds = len(report.kinds) > 1
        said += ["", *_table([_row(one, kinds) for one in rows[:MOST_ROWS]], kinds)]
        said += _rest(len(rows) - MOST_ROWS)
    return [printable(line) for line in said]


def _row(one: CheckedPicture, kinds: bool) -> list[str]:
    return [
        _cut(one.name),
        *([one.kind] if kinds else []),
        "{} x {}".format(*one.size_px),
        _sizes(one),
        f"{min(view.kept for view in one.views):.0%}",
        str(one.tokens),
        shown_number(one.showings),
        _cut(one.caption),
        "; ".join(mark.text for mark in one.marks),
    ]


def _sizes(one: CheckedPicture) -> str:
    """The sizes it is shown at: two of them, or the first and how many more."""
    sizes = list(dict.fromkeys("{} x {}".format(*view.crop.size_px) for view in one.views))
    return ", ".join(sizes) if len(sizes) <= 2 else f"{sizes[0]} and {len(sizes) - 1} more"


def _table(rows: Sequence[Sequence[str]], kinds: bool) -> list[str]:
    heads = ["picture", *(["for"] if kinds else []), "size", "shown at", "kept", "tokens", "epoch"]
    table = [[*heads, "caption", "to look at"], *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def _cut(text: str) -> str:
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."


def _rest(number: int) -> list[str]:
    return [f"  ... and {number} more; --json and -o show them"] if number > 0 else []
