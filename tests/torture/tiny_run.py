"""A run of 24 steps that takes a second or two, and what of it must be equal to the bit.

Its processes are forked from one that has imported everything, with one thread.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["SOURCE_DATE_EPOCH"] = "1700000000"  # the date in the adapter's metadata

import torch
import tqdm
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_sd_lora
from lora_sd import train as trainer
from lora_sd.errors import UserError
from lora_sd.run_folder import RunFolder
from tests.conftest import PICTURE_PX, make_model_folder

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # a thread, which would not live on in a forked process

SAVE_EVERY = 2
STEPS = 24
CRASHED = 70  # exit status of a forked process in which anything else than a UserError was raised
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "dropout": {},
    "text encoder": {"adapter": {"text_encoder": True}},
    "average": {"train": {"ema_decay": 0.9}},
    "validation": {"train": {"validate_every_steps": 3, "keep_best": True}},
}
"""What differs from `settings_in`, by name."""


def settings_in(folder: Path, variant: str = "dropout", **more: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run in a folder; model and pictures are made where they are not there.

    24 steps of three pictures in three passes, of two sizes, in epochs of 33 and 34; with dropout.
    """
    model, pictures, kept = (folder / name for name in ("model", "pictures", "kept"))
    if not model.exists():
        model.mkdir(parents=True)
        make_model_folder(model)
        for where, count in ((pictures, 10), (kept, 2)):
            where.mkdir()
            for number in range(count):
                size = (PICTURE_PX, PICTURE_PX) if number % 4 else (32, 8)
                colour = (25 * number, 255 - 20 * number, 90)
                Image.new("RGB", size, colour).save(where / f"{number}.png")
                (where / f"{number}.txt").write_text(f"a wall, of {number}")
    settings: dict[str, dict[str, Any]] = {
        "base": {"model": str(model / "sd")},
        "data": {
            "folders": [{"folder": str(pictures), "repeats": 3.35}],
            "resolution_px": PICTURE_PX, "max_aspect_ratio": 4, "flip": True,
        },
        "adapter": {"rank": 2, "alpha": 2, "conv_rank": 2, "conv_alpha": 1, "dropout": 0.2},
        "train": {"steps": STEPS, "batch_size": 1, "gradient_accumulation": 3},
        "optimizer": {"warmup_steps": 3, "learning_rate": 1e-2},
        "output": {
            "folder": str(folder / "outputs"), "name": "run", "save_every_steps": SAVE_EVERY,
        },
    }  # fmt: skip
    if variant == "validation":
        settings["data"]["folders"].append({"folder": str(kept), "kind": "validation"})
    for changes in (VARIANTS[variant], more):
        for group, values in changes.items():
            settings.setdefault(group, {}).update(values)
    return settings


def run_of(settings: dict[str, Any]) -> RunFolder:
    """Where its run is, or will be."""
    return RunFolder(Path(settings["output"]["folder"]) / settings["output"]["name"])


def arguments(settings: dict[str, Any]) -> list[str]:
    """The command line that begins its run, or goes on with it once there is something of it."""
    run = run_of(settings)
    if run.path.exists():
        return ["--resume", str(run.path)]
    file = run.path.parent.parent / f"{run.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(settings))
    return ["--config", str(file)]


def train_forked(
    settings: dict[str, Any], log: Path, before: Callable[[], object] | None = None
) -> int:
    """Begin or go on with a run in a forked process; its pid.

    Args:
        log: gets what it says.
        before: is called in that process first.
    """
    argv = arguments(settings)

    def work() -> int:
        if before is not None:
            before()
        return train_sd_lora.main(argv)

    return forked(work, log)


def forked(work: Callable[[], int], log: Path) -> int:
    """Do something in a forked process of a session of its own, which ends with the status that it
    returns, without any of what Python does at its end; the pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = CRASHED
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        status = work()
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        status = error.exit_status
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """Wait for a process; its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trained(settings: dict[str, Any], log: Path) -> float:
    """Train without interruption; the seconds it took.

    Raises:
        RuntimeError: it did not end well.
    """
    started = time.monotonic()
    status = ended(train_forked(settings, log))
    if status:
        raise RuntimeError(f"a run that nothing interrupts ended with {status}: {tail(log)}")
    return time.monotonic() - started


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-1500:] if log.exists() else ""


# --- what must be equal ---


def digests(run: RunFolder) -> dict[str, str]:
    """SHA-256 of all that a finished run has computed, times left out."""
    newest = max(run.checkpoints.glob("step_*"), key=lambda folder: int(folder.name[5:]))
    found = {
        "the exported file": hashlib.sha256(run.adapter_file.read_bytes()).hexdigest(),
        "the weights": digest_of(load_file(newest / "adapter.safetensors")),
        "the optimizer's state": digest_of(state_of(newest)),
        "losses and learning rates": digest_of(metrics_of(run)),
    }
    for file in run.path.glob("*.safetensors"):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def state_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the adapter."""
    return torch.load(next(checkpoint.glob("*.pt")), weights_only=True)


def metrics_of(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of a run without what depends on the clock."""
    timed = ("images_per_s", "seconds")
    return [
        {name: value for name, value in record.items() if name not in timed}
        for record in run.read_metrics()
    ]


def digest_of(values: Any) -> str:
    """SHA-256 of nested values and tensors: of their bits, kinds and names."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                digest.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)}".encode())
            for one in value:
                add(one)
        else:
            digest.update(repr(value).encode())

    add(values)
    return digest.hexdigest()


def files_of(run: RunFolder) -> set[str]:
    """Names of all that is in a run's folder."""
    found = {str(path.relative_to(run.path)) for path in run.path.rglob("*")}
    return found - {".lock"}


def newest_whole_step(run: RunFolder) -> int:
    """The step of the newest checkpoint that is as its manifest says; 0 where there is none.

    Judged here anew, and not by the code under test.
    """
    steps = [0]
    for folder in run.checkpoints.glob("step_*"):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            manifest = json.loads((folder / "manifest.json").read_text())
            files = manifest["files"].items()
            whole = all(
                hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
                and (folder / name).stat().st_size == size
                for name, (size, digest) in files
            )
            if (
                whole
                and len(manifest["files"]) > 1
                and folder.name == f"step_{manifest['step']:06d}"
            ):
                steps.append(manifest["step"])
    return max(steps)


def last_step_told(run: RunFolder) -> int:
    """The last step in the metrics."""
    return max((record.get("step", 0) for record in run.read_metrics()), default=0)


assert trainer  # imported for the forked processes
