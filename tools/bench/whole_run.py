"""Whole runs, from the start of a process to the adapter's file: our trainer and diffusers' example
script (examples/text_to_image/train_text_to_image_lora.py) on the same work.

Both teach a base the example pictures, the embedded base at 64 px unless told: attention layers at
rank 16, the same number of steps and batch, AdamW at a constant rate, no samples, no validation, no
checkpoint before the end, and nothing cached from before. Each starts anew in a folder of its own.
The script is not part of this project; its interpreter may be another one, with the packages that
it wants.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.bench.errors import BenchError
from tools.bench.machine import PROJECT
from tools.bench.rounds import Spread, ratios
from tools.bench.table import Row, Target

PICTURES = PROJECT / "assets" / "ink-icons"
LOOK_EVERY_S = 0.005


@dataclass(frozen=True)
class Work:
    """What is taught.

    Attributes:
        base: a base model's folder.
        px: side of the square pictures.
        example_script: diffusers' script to run against, with an interpreter that has the packages
            it wants; None: our own is measured alone.
    """

    steps: int
    base: Path = PROJECT / "assets" / "tiny-sd"
    px: int = 64
    batch: int = 8
    example_script: Path | None = None
    example_python: Path = Path(sys.executable)


@dataclass(frozen=True)
class Run:
    """Seconds: of the clock, of processors, and to the end of the first step (0: unknown)."""

    wall_s: float
    processor_s: float
    first_step_s: float = 0.0


def measure_runs(work: Work, rounds: int) -> list[Row]:
    """Rows on whole runs."""
    part = f"whole run, {work.base.name} at {work.px} px, batch {work.batch}"
    runs: dict[str, list[Run]] = {"ours": [], "example": []}
    for number in range(rounds):
        sides = ["ours", "example"] if work.example_script is not None else ["ours"]
        for side in sides if number % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory() as folder:
                one = _ours if side == "ours" else _example
                runs[side].append(one(Path(folder), work))
    ours, example = runs["ours"], runs["example"]
    pictures = work.steps * work.batch

    def speed(some: Sequence[Run]) -> Spread:
        return Spread.of([pictures / run.wall_s for run in some])

    rows = [
        Row(part, f"ours, {work.steps} steps, everything included", speed(ours), "images/s"),
        Row(part, "ours, start to first step", Spread.of([r.first_step_s for r in ours]), "s"),
        Row(part, "ours, processor time", Spread.of([run.processor_s for run in ours]), "s"),
    ]
    against, target = "ours / diffusers' example script, throughput", Target(at_least=1.5)
    if work.example_script is None:
        note = "not measured: give --example-script"
        return [*rows, Row(part, against, None, target=target, note=note)]
    faster = ratios([run.wall_s for run in example], [run.wall_s for run in ours])
    by_processor = ratios([r.processor_s for r in example], [r.processor_s for r in ours])
    return [
        *rows,
        Row(part, "example script, everything included", speed(example), "images/s"),
        Row(
            part, "example script, processor time", Spread.of([r.processor_s for r in example]), "s"
        ),
        Row(part, against, faster, target=target),
        Row(part, "the same by processor time", by_processor),
    ]


def _ours(folder: Path, work: Work) -> Run:
    outputs = folder / "outputs"
    settings = {
        "base.model": work.base,
        "data.folder": PICTURES,
        "data.resolution_px": work.px,
        "adapter.preset": "attention",
        "adapter.rank": 16,
        "train.steps": work.steps,
        "train.batch_size": work.batch,
        "optimizer.learning_rate": 1e-4,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "output.folder": outputs,
        "output.name": "run",
        "output.save_every_steps": work.steps,
    }
    command = [sys.executable, "train_sd_lora.py"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    run = _timed(command, PROJECT, {}, first_sign=outputs / "run" / "metrics.jsonl")
    _check_made(outputs / "run" / "adapter.safetensors")
    return run


def _example(folder: Path, work: Work) -> Run:
    assert work.example_script is not None
    pictures = folder / "pictures"
    pictures.mkdir()
    with (pictures / "metadata.jsonl").open("w") as captions:
        for picture in sorted(PICTURES.glob("*.png")):
            shutil.copy(picture, pictures)
            text = picture.with_suffix(".txt").read_text().strip()
            captions.write(json.dumps({"file_name": picture.name, "text": text}) + "\n")
    settings = {
        "pretrained_model_name_or_path": work.base,
        "train_data_dir": pictures,
        "caption_column": "text",
        "resolution": work.px,
        "train_batch_size": work.batch,
        "max_train_steps": work.steps,
        "checkpointing_steps": 2 * work.steps,
        "rank": 16,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "mixed_precision": "no",
        "seed": 0,
        "output_dir": folder / "out",
    }
    runner = Path(__file__).with_name("run_example.py")
    command = [str(path) for path in (work.example_python, runner, work.example_script.resolve())]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    run = _timed([*command, "--center_crop"], folder, {"HF_HOME": str(folder / "hf")})
    _check_made(folder / "out" / "pytorch_lora_weights.safetensors")
    return run


def _timed(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str],
    first_sign: Path | None = None,
) -> Run:
    """Run a program to its end.

    Args:
        first_sign: a file that appears with the first step.

    Raises:
        BenchError: it failed; with the end of what it said.
    """
    before = _children_s()
    first_step_s = 0.0
    with tempfile.TemporaryFile() as said:
        began = time.monotonic()
        program = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **environment}, stdout=said, stderr=said
        )
        while first_sign is not None and program.poll() is None and not first_step_s:
            time.sleep(LOOK_EVERY_S)
            if first_sign.exists():
                first_step_s = time.monotonic() - began
        status = program.wait()
        wall_s = time.monotonic() - began
        said.seek(0)
        if status:
            end = said.read().decode(errors="replace").strip().splitlines()[-3:]
            raise BenchError(f"'{' '.join(command[:3])}' ended with {status}: {' '.join(end)}")
    return Run(wall_s, _children_s() - before, first_step_s)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _check_made(file: Path) -> None:
    if not file.is_file():
        raise BenchError(f"'{file.name}' was not made")
