"""`plan`: what memory, time and disk a run needs, before anything of it starts."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd.config import parse_command_line
from lora_sd.config.settings import Config, config_from_values, read_yaml
from lora_sd.errors import printable, shown_size
from lora_sd.verbs.arguments import add_trainer_settings

if TYPE_CHECKING:
    from lora_sd.plan import Plan
    from lora_sd.plan.cards import Card

DESCRIPTION = """\
Say what a run needs, before anything of it starts: memory by part and phase, time, disk, how often
the pictures are seen, and which settings fit graphics cards of 6, 8, 12, 16 and 24 GB.

Where base model and device are at hand, a few real steps are done on noise and measured. Without
them, and with --shapes, all is computed from shapes: the base need not be on this machine if its
family is named: sd15, sd21 or sdxl. Settings of the trainer may follow: --train.batch_size 4."""
EXAMPLE = """\
  python -m lora_sd plan --config configs/sd15.yaml
  python -m lora_sd plan --base.model sdxl --data.resolution_px 1024 --shapes"""
NAMES = {"cuda": "a GPU of NVIDIA's", "cpu": "the CPU", "mps": "Apple's GPU"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as for training")
    parser.add_argument("--json", action="store_true", help="everything as JSON, for programs")
    parser.add_argument(
        "--shapes", action="store_true", help="compute all from shapes, and measure nothing"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="here",
        help="plan for a GPU of NVIDIA's or for the CPU (default: what is here)",
    )
    add_trainer_settings(parser)


def run(options: argparse.Namespace) -> int:
    line = parse_command_line(options.settings, "python -m lora_sd plan")
    config = config_from_values(line.over(read_yaml(options.config) if options.config else {}))
    plan = _with_bar(config, not options.shapes, options.device)
    if options.json:
        print(as_json(plan))
    else:
        print("\n".join(printable(line) for line in lines(plan)))
    return 0


def _with_bar(config: Config, measured: bool, device: Any) -> "Plan":
    from tqdm import tqdm

    from lora_sd.plan import make_plan

    with tqdm(desc="reading pictures", unit="picture", leave=False, delay=2.0) as bar:

        def advance(done: int, of: int) -> bool:
            bar.total = of
            bar.update(done - bar.n)
            return False

        return make_plan(config, measured=measured, device=device, on_picture=advance)


def as_json(plan: "Plan") -> str:
    """The plan with what follows from it; bytes, pixels, seconds."""
    from dataclasses import asdict

    values = asdict(plan)
    for phase, of in zip(values["phases"], plan.phases, strict=True):
        phase["total"] = of.total
    follows = {
        "pictures_seen": plan.pictures_seen,
        "epochs": plan.epochs,
        "highest": plan.highest.total,
        "time_s": plan.time_s,
    }
    return json.dumps(values | follows, indent=1)


def lines(plan: "Plan") -> list[str]:
    """The plan as lines of text."""
    from lora_sd.plan import ASSUMED

    width, height = plan.size_px
    passes = plan.gradient_accumulation
    seen = f"{plan.steps} steps of {plan.batch_size * passes}: {plan.pictures_seen} pictures seen"
    if plan.epochs is not None:
        seen += f", {plan.epochs:.1f} epochs of {plan.epoch:g}"
    said = [
        f"'{plan.base}' on {NAMES[plan.device]}: {plan.layers} layers, {plan.parameters:,} "
        f"parameters; batches of {plan.batch_size} at {width} x {height}",
        seen,
        "",
        f"memory: {shown_size(plan.highest.total)} at most, {plan.highest.name}",
        *_phases(plan),
    ]
    if plan.measured is not None:
        ratio = plan.training.total / plan.measured.highest
        said += [
            "",
            f"measured in a real step: {shown_size(plan.measured.highest)}; from shapes "
            f"{shown_size(plan.training.total)}, {ratio:.0%} of it",
        ]
    if plan.time_s is not None and plan.measured is not None:
        said.append(
            f"time: {shown_time(plan.time_s)} for all steps ({plan.measured.pass_s:.2f} s a pass), "
            f"without encoding, samples and saving"
        )
    said += [
        "",
        f"disk: adapter {shown_size(plan.adapter_bytes)}; a checkpoint "
        f"{shown_size(plan.checkpoint_bytes)}, {plan.checkpoints} kept"
        + (f"; encoded pictures {shown_size(plan.encoded_bytes)}" if plan.encoded_bytes else ""),
        "",
        "what fits a graphics card",
        *(f"  {one.gb:3g} GB  {_fit(one)}" for one in plan.cards),
        "",
        *(f"- {sentence}" for sentence in (*plan.notices, *ASSUMED)),
    ]
    return said


def _phases(plan: "Plan") -> list[str]:
    """A table: what lies in memory in each phase."""
    parts = list(dict.fromkeys(part for phase in plan.phases for part in phase.parts))
    rows = [["", *(phase.name for phase in plan.phases)]]
    for part in parts:
        sizes = [phase.parts.get(part) for phase in plan.phases]
        rows.append([part, *("" if size is None else shown_size(size) for size in sizes)])
    rows.append(["together", *(shown_size(phase.total) for phase in plan.phases)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _fit(card: "Card") -> str:
    size = shown_size(card.highest)
    what = " + ".join(card.changes) or "as set"
    if not card.fits:
        return f"no: {size} {card.phase}" + (f", with {what}" if card.changes else "")
    flags = " ".join(f"--{name} {value}".rstrip() for name, value in card.flags.items())
    return f"{size}  {what}" + (f":  {flags}" if flags else "")


def shown_time(seconds: float) -> str:
    """'40 s', '12 min', '3.5 h'."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
