"""Run a measurement in a process of its own: `python -m tools.bench.processes` is that process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from tools.bench.cases import Case
from tools.bench.errors import BenchError
from tools.bench.machine import PROJECT

ANSWER = "tools.bench answers: "


def measure(
    what: str, case: Case, environment: Mapping[str, str] | None = None, **arguments: Any
) -> dict[str, Any]:
    """What `measure_step` or `measure_peak` gives for a case.

    Args:
        what: 'step' or 'peak'.

    Raises:
        BenchError: the process failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "tools.bench.processes", what]
    command += [json.dumps(asdict(case)), json.dumps(arguments)]
    done = subprocess.run(
        command,
        cwd=PROJECT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError(f"{case.name}: {said[-1] if said else f'ended with {done.returncode}'}")
    found: dict[str, Any] = json.loads(answers[-1].removeprefix(ANSWER))
    return found


def main(what: str, case: str, arguments: str) -> None:
    """Measure, and print what was found as JSON."""
    import torch

    from lora_sd.memory.heap import keep_freed_memory
    from tools.bench.memory import measure_peak
    from tools.bench.step import measure_step

    torch.set_num_threads(1)
    if what == "step":
        keep_freed_memory()
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "step": measure_step,
        "peak": measure_peak,
    }
    found = measures[what](Case(**json.loads(case)), **json.loads(arguments))
    print(ANSWER + json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
