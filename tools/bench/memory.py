"""The highest memory of a few steps of one side, beyond the bare frozen UNet: in a process that
does nothing else.

Counted is all that training adds: the adapter, copies that it makes of the base's weights,
activations, gradients, the optimizer's states. On the CPU it is the growth of the process's
resident memory (Linux alone tells its peak), where the allocator gives freed memory back at once;
on a GPU what PyTorch has allocated there.
"""

import gc
from pathlib import Path
from typing import Any

import torch

from tools.bench.cases import Case, build_unet, make_inputs
from tools.bench.sides import limit, make_side

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Of the process, for glibc: blocks from 64 KiB go back to the system when they are freed."""
STEPS = 2  # the optimizer's states come with the first
MIB = 2**20


def measure_peak(case: Case, side_name: str) -> dict[str, Any]:
    """'beyond_mib', the peak beyond the bare UNet, and 'unet_mib', the UNet's weights; 'beyond_mib'
    is None where the system does not tell it."""
    import lycoris.modules.locon  # noqa: F401  so that no import is counted
    import peft  # noqa: F401

    unet = build_unet(case)
    inputs = make_inputs(case, unet.config)
    warm = limit(unet, inputs, case)  # loads the code that computes
    warm.pull()
    del warm
    gc.collect()
    weights = sum(weight.numel() * weight.itemsize for weight in unet.parameters())
    before = _now(case.device)
    side = make_side(side_name, unet, inputs, case)
    for _ in range(STEPS):
        side.pull()
        side.learn()
    peak = _peak(case.device)
    known = before is not None and peak is not None
    return {
        "beyond_mib": (peak - before) / MIB if known else None,  # type: ignore[operator]
        "unet_mib": weights / MIB,
    }


def _now(device: str) -> int | None:
    """Bytes taken now; from here on the peak is looked for."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        RESET.write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak(device: str) -> int | None:
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if STATUS.is_file() else None


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
