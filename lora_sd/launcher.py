"""`accelerate launch` and `torchrun` as the trainer sees them: its parent, and what it has set."""

import os
from pathlib import Path

import psutil
from huggingface_hub.constants import HF_HOME

LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "accelerate_launch")  # files' names
LAUNCHER_MODULES = ("accelerate.commands.", "torch.distributed.")
THREADS = "OMP_NUM_THREADS"
SETTINGS = ("--num-cpu-threads-per-process", "--config-file")


def launcher() -> psutil.Process | None:
    """What launched this process and waits for it; None where a shell or another program did."""
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    try:
        parent = psutil.Process(os.getppid())
        words = parent.cmdline()[:6]  # python, its options, and what it runs
    except psutil.Error:
        return None
    launches = any(Path(one).stem in LAUNCHERS or one.startswith(LAUNCHER_MODULES) for one in words)
    return parent if launches else None


def take_all_cores() -> None:
    """Let a run that is alone use all cores of the CPU, where nobody has said how many.

    Launchers give each process one. To be called before torch is imported, which then reads it.
    """
    parent = launcher()
    if parent is None or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return
    try:
        said, words = THREADS in parent.environ(), parent.cmdline()
    except psutil.Error:
        return
    said |= any(one.replace("_", "-").startswith(SETTINGS) for one in words)
    said |= any(Path(HF_HOME, "accelerate").glob("default_config.*"))
    if not said:
        os.environ.pop(THREADS, None)
