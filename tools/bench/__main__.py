"""`python -m tools.bench`: run the benchmark, print its table, write its JSON."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tools.bench import cases, files, generation, whole_run
from tools.bench.cases import Case
from tools.bench.errors import BenchError
from tools.bench.machine import describe_machine, load_average
from tools.bench.memory import ENVIRONMENT
from tools.bench.processes import measure
from tools.bench.rounds import Spread, ratios
from tools.bench.sides import PEERS
from tools.bench.table import Row, Target, table
from tools.bench.whole_run import Work

STEP_TARGETS = {
    ("sd15", "attention"): 1.03,
    ("sd15", "attention-conv"): 1.06,
    (cases.EMBEDDED, "attention"): 1.10,
    (cases.EMBEDDED, "attention-conv"): 1.30,
}
"""Our step / the limit on the CPU, at most (issue 7)."""
GPU_TARGETS = {"attention": 1.10, "attention-conv": 1.15}
COMPILED_TARGET = 1.05


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        rounds: of a quick case; `slow_rounds`: of one whose step takes seconds.
        runs, run_steps: whole runs of each side, and their steps.
        pictures: to be scanned.
    """

    rounds: int
    slow_rounds: int
    runs: int
    run_steps: int
    pictures: int


FULL = Size(rounds=12, slow_rounds=3, runs=2, run_steps=80, pictures=32)
QUICK = Size(rounds=8, slow_rounds=2, runs=1, run_steps=50, pictures=16)
REHEARSAL = Size(rounds=3, slow_rounds=3, runs=1, run_steps=3, pictures=4)


def step_target(case: Case) -> Target | None:
    """What our step may take, as a multiple of the limit."""
    if case.dtype != "float32":
        return Target(at_most=COMPILED_TARGET if case.compile else GPU_TARGETS[case.preset])
    at_most = STEP_TARGETS.get((case.unet, case.preset))
    return None if at_most is None else Target(at_most=at_most)


def step_rows(case: Case, found: dict[str, Any]) -> list[Row]:
    """What `measure_step` found, as rows."""
    part = f"step, {case.name}"
    whole, passes = found["whole"], found["passes"]
    at_small_batch = case.preset == "attention-conv" and case.batch <= 4 and case.dtype != "float32"
    rows = [
        Row(part, "limit: frozen UNet, forward and backward", Spread.of(whole["limit"]), "s"),
        Row(part, "ours / limit", ratios(whole["ours"], whole["limit"]), target=step_target(case)),
        Row(part, "ours / limit, without AdamW", ratios(passes["ours"], whole["limit"])),
    ]
    for peer in PEERS:
        if peer in found["failed"]:
            rows.append(Row(part, f"{peer} / limit", None, note=found["failed"][peer]))
            continue
        faster = 1 / 1.25 if at_small_batch and peer == "PEFT" else 1.0
        rows += [
            Row(part, f"{peer} / limit", ratios(whole[peer], whole["limit"])),
            Row(part, f"ours / {peer}", ratios(whole["ours"], whole[peer]), target=Target(faster)),
        ]
    return rows


def memory_rows(case: Case, found: dict[str, dict[str, Any]]) -> list[Row]:
    """What `measure_peak` found by side, as rows."""
    part = f"step, {case.name}"
    rows = []
    for side, one in found.items():
        what = f"{side}: peak memory beyond the UNet's {one['unet_mib']:.0f} MiB"
        if one["beyond_mib"] is None:
            rows.append(Row(part, what, None, note="not measured: the system does not tell"))
        else:
            rows.append(Row(part, what, Spread.of([one["beyond_mib"]]), "MiB"))
    ours, theirs = (found[side]["beyond_mib"] for side in ("ours", "PEFT"))
    if ours and theirs:
        against = Spread.of([ours / theirs])
        rows += [
            Row(part, f"ours / PEFT, peak memory{what}", against, target=Target(at_most=at_most))
            for what, at_most in (("", 1.0), (", without checkpointing", 0.8))
        ]
    return rows


def case_rows(case: Case, size: Size, memory: bool = True) -> list[Row]:
    """A case's step and memory, in processes of their own."""
    is_slow = case.unet in ("sd15", "sdxl") and case.device == "cpu"
    rounds = size.slow_rounds if is_slow else size.rounds
    try:
        rows = step_rows(case, measure("step", case, rounds=rounds))
        if memory:
            # Memory is not time: two at once.
            trainers = ("ours", "PEFT")
            with ThreadPoolExecutor(2) as pool:
                peaks = pool.map(
                    lambda side: measure("peak", case, ENVIRONMENT, side_name=side), trainers
                )
                rows += memory_rows(case, dict(zip(trainers, peaks, strict=True)))
    except BenchError as error:
        return [Row(f"step, {case.name}", "failed", None, note=str(error))]
    return rows


def cpu_rows(unet: str) -> Callable[[Size, argparse.Namespace], list[Row]]:
    """The step on the CPU with one UNet."""

    def rows(size: Size, options: argparse.Namespace) -> list[Row]:
        found = [
            case
            for case in cases.cpu_cases()
            if case.unet == unet and options.preset in (None, case.preset)
        ]
        if options.rehearse:
            found = [cases.miniature_case("attention-conv")] if unet == cases.EMBEDDED else []
        return [row for case in found for row in case_rows(case, size, options.memory)]

    return rows


def gpu_rows(size: Size, options: argparse.Namespace) -> list[Row]:
    """The step on a GPU; in rehearsal a few miniatures of it on the CPU."""
    if options.rehearse:
        found = cases.gpu_cases(rehearse=True)
        return [
            row for case in (found[1], found[-1]) for row in case_rows(case, size, memory=False)
        ]
    if torch.cuda.is_available():
        return [row for case in cases.gpu_cases() for row in case_rows(case, size, options.memory)]
    note = "not measured: no GPU here"
    return [
        Row(
            "step on a GPU", f"{case.name}: ours / limit", None, target=step_target(case), note=note
        )
        for case in cases.gpu_cases()
    ]


def run_rows(size: Size, options: argparse.Namespace) -> list[Row]:
    """Whole runs."""
    given = {
        "base": options.run_base and options.run_base.resolve(),
        "px": options.run_px,
        "batch": options.run_batch,
        "example_script": options.example_script,
        "example_python": options.example_python,
    }
    work = Work(
        options.run_steps or size.run_steps,
        **{name: value for name, value in given.items() if value is not None},
    )
    return whole_run.measure_runs(work, size.runs)


def generation_rows(size: Size, options: argparse.Namespace) -> list[Row]:
    """Drawing."""
    case = cases.miniature_case() if options.rehearse else None
    rows = generation.measure_pictures(1 if options.rehearse else size.rounds // 2)
    return rows + generation.measure_passes(size.slow_rounds + 1, case)


def file_rows(size: Size, options: argparse.Namespace) -> list[Row]:
    """Files and pictures."""
    unet, rank = ("miniature", 2) if options.rehearse else ("sd15", 16)
    rows = files.measure_adapter_files(size.slow_rounds, unet, rank)
    return rows + files.measure_pictures(size.pictures, size.runs)


PARTS: dict[str, Callable[[Size, argparse.Namespace], list[Row]]] = {
    "step-tiny": cpu_rows(cases.EMBEDDED),
    "step-sd15": cpu_rows("sd15"),
    "step-gpu": gpu_rows,
    "whole-run": run_rows,
    "generation": generation_rows,
    "files": file_rows,
}


def main(argv: Sequence[str]) -> int:
    """Run the parts that are asked for; 1 where one failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {', '.join(PARTS)}")
    parser.add_argument("--preset", choices=cases.PRESETS, help="of the steps on the CPU")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--rehearse", action="store_true", help="try it all on miniatures; figures mean nothing"
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="leave peak memory out"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--example-script", type=Path, help="diffusers' train_text_to_image_lora.py, to run against"
    )
    parser.add_argument(
        "--example-python", type=Path, help="an interpreter with the packages that it wants"
    )
    parser.add_argument("--run-base", type=Path, help="another base's folder, for the whole runs")
    for name in ("px", "batch", "steps"):
        parser.add_argument(f"--run-{name}", type=int, help="of the whole runs")
    options = parser.parse_args(argv)
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    size = REHEARSAL if options.rehearse else QUICK if options.quick else FULL
    torch.set_num_threads(1)
    about: dict[str, Any] = {"machine": describe_machine(), "load_at_start": load_average()}
    began = time.monotonic()
    rows: list[Row] = []
    for part in chosen:
        print(f"{part} ...", file=sys.stderr, flush=True)
        try:
            rows += PARTS[part](size, options)
        except BenchError as error:
            rows.append(Row(part, "failed", None, note=str(error)))
    about |= {"load_at_end": load_average(), "seconds": round(time.monotonic() - began)}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(table(rows))
    if options.json:
        rows_json = [row.as_dict() for row in rows]
        options.json.write_text(json.dumps({**about, "rows": rows_json}, indent=1) + "\n")
    return int(any(row.what == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
