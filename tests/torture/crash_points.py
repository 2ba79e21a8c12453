"""Cut every write of a run off at every operation on the disk, and see what is left.

    python -m tests.torture.crash_points

For each of the files and folders that a run writes, and for each operation of that writing: the
process dies before it, within it and after it; or the operation fails with each of the system's
errors; or the power goes, and all that was not forced onto the disk is lost. Afterwards there must
be what was there before, or the new one, whole.
"""

import argparse
import os
import pickle
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_sd import checkpoint, inject
from lora_sd.adapter import Adapter
from lora_sd.errors import UserError
from lora_sd.formats import save_adapter
from lora_sd.layer_names import layer_shapes
from lora_sd.run_folder import RunFolder, create_run
from tests.conftest import choose, make_unet
from tests.torture.broken_savers import BROKEN
from tests.torture.disk_operations import DIED, FAULTS, DiskOperations, die_at, fail_at
from tests.torture.power_loss import PowerLoss
from tests.torture.tiny_run import digest_of, ended, forked, newest_whole_step, tail

KEEP = 2


def adapter_of(step: int) -> Adapter:
    """A small adapter that differs from step to step."""
    unet = make_unet()
    inject.attach(unet, choose(unet, "attention")[:4])
    adapter = inject.collect(unet, exact=True)
    generator = torch.Generator().manual_seed(step)
    for layer in adapter.layers.values():
        layer.up.copy_(torch.randn(layer.up.shape, generator=generator))
    return adapter


def state_of(step: int) -> dict:
    """The state of an optimizer and of a schedule."""
    moments = {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((64,), step / 7)}}
    return {
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-3}]},
        "schedule": {"step": step},
    }


IDENTITY = checkpoint.Identity(
    {"train": {"steps": 24, "batch_size": 1, "gradient_accumulation": 1}, "output": {}},
    {"0.png": "ab", "1.png": "cd"},
    "base",
    1,
)
ADAPTERS = {step: adapter_of(step) for step in (2, 4, 6, 8)}
STATES = {step: state_of(step) for step in (2, 4, 6, 8)}
SHAPES = layer_shapes(make_unet())


def save(run: RunFolder, step: int) -> None:
    """Save a checkpoint as the trainer does."""
    checkpoint.save(run, step, ADAPTERS[step], STATES[step], IDENTITY, KEEP)


@dataclass(frozen=True)
class Write:
    """Something that a run writes.

    Attributes:
        do: writes it, in a folder that `prepared` has filled.
        judge: what is wrong in the folder, given whether the writing said that it succeeded;
            '' where all is well.
    """

    do: Callable[[RunFolder], object]
    judge: Callable[[RunFolder, bool], str]


def prepared(folder: Path) -> RunFolder:
    """A run with checkpoints of steps 2 and 4, a result, metrics and changes."""
    run = create_run(folder, "run", "run", "train:\n  steps: 24\n")
    for step in (1, 2, 3, 4, 5):
        run.append_metrics({"step": step, "loss": 1 / step})
    save(run, 2)
    save(run, 4)
    save_adapter(ADAPTERS[4], run.adapter_file, torch.float16)
    return run


# --- what must be there afterwards ---


def judge_checkpoint(run: RunFolder, succeeded: bool) -> str:
    """The checkpoint of step 4 or of step 6 is the newest, and holds what was saved."""
    try:
        found, _ = checkpoint.find_newest(run)
    except UserError as error:
        return f"no checkpoint is left: {error}"
    if found is None or found.step not in (4, 6) or (succeeded and found.step != 6):
        return f"the newest checkpoint is {found and found.step}"
    if newest_whole_step(run) != found.step:
        return f"step {newest_whole_step(run)} is whole, and {found.step} is chosen"
    try:
        state, adapter = found.state(torch.device("cpu")), found.adapter(SHAPES)
    except Exception as error:
        return f"step {found.step} cannot be read: {error}"
    if digest_of(state) != digest_of(STATES[found.step]):
        return f"the state of step {found.step} is another"
    for name, layer in ADAPTERS[found.step].layers.items():
        if not torch.equal(layer.up, adapter.layers[name].up):
            return f"the adapter of step {found.step} is another"
    return _judge_next_save(run, found.step)


def _judge_next_save(run: RunFolder, step: int) -> str:
    """The run can go on from a step: what is left over goes, and the next save works."""
    for rejected in checkpoint.find_newest(run)[1]:
        checkpoint.set_aside(rejected)
    checkpoint.clean(run)
    try:
        save(run, step + 2)
    except UserError as error:
        return f"the next save fails: {error}"
    left = {path.name for path in run.checkpoints.iterdir()}
    left = {name for name in left if not name.startswith("damaged_")}
    if left != {f"step_{step:06d}", f"step_{step + 2:06d}"}:
        return f"after the next save there are {sorted(left)}"
    return ""


def judge_result(run: RunFolder, succeeded: bool) -> str:
    """The adapter is the old one or the new one, to the byte."""
    data = run.adapter_file.read_bytes() if run.adapter_file.is_file() else b""
    if data not in ((NEW_RESULT,) if succeeded else (OLD_RESULT, NEW_RESULT)):
        return f"the adapter has {len(data)} bytes, and is neither the old one nor the new one"
    save_adapter(ADAPTERS[6], run.adapter_file, torch.float16)
    checkpoint.clean(run)
    return f"left over: {left}" if (left := sorted(p.name for p in run.path.glob(".tmp*"))) else ""


def judge_metrics(run: RunFolder, succeeded: bool) -> str:
    """The metrics are those before or after they were cut."""
    steps = [record["step"] for record in run.read_metrics()]
    allowed = ([1, 2, 3, 4],) if succeeded else ([1, 2, 3, 4, 5], [1, 2, 3, 4])
    return "" if steps in allowed else f"the metrics hold steps {steps}"


def judge_new_run(run: RunFolder, succeeded: bool) -> str:
    """There is no such run, or a whole one; and the name can be had by whoever begins again."""
    new = RunFolder(run.path.with_name("new"))
    if new.path.exists():
        whole = new.config_file.read_text() == "a: 1\n" and new.checkpoints.is_dir()
        return "" if whole else f"a run of {sorted(p.name for p in new.path.iterdir())}"
    if succeeded:
        return "it is said to be made, and is not there"
    create_run(run.path.parent, "new", "new", "a: 1\n")
    left = sorted(path.name for path in run.path.parent.glob(".tmp*"))
    return f"left over: {left}" if left else ""


WRITES = {
    "checkpoint": Write(lambda run: save(run, 6), judge_checkpoint),
    "result": Write(
        lambda run: save_adapter(ADAPTERS[6], run.adapter_file, torch.float16), judge_result
    ),
    "metrics": Write(lambda run: run.cut_metrics(4), judge_metrics),
    "new run": Write(
        lambda run: create_run(run.path.parent, "new", "new", "a: 1\n"), judge_new_run
    ),
}


def _bytes_of(step: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(ADAPTERS[step], Path(folder) / "adapter.safetensors", torch.float16)
        return (Path(folder) / "adapter.safetensors").read_bytes()


OLD_RESULT, NEW_RESULT = _bytes_of(4), _bytes_of(6)


# --- one after the other ---


@dataclass
class Found:
    """What was seen: how many operations each write has, cases, and what was wrong."""

    operations: dict[str, int] = field(default_factory=dict)
    cases: int = 0
    problems: list[str] = field(default_factory=list)

    def told(self) -> str:
        """The figures as lines."""
        counts = ", ".join(f"{name} {count}" for name, count in self.operations.items())
        return "\n".join(
            [
                f"operations on the disk: {counts}",
                f"{self.cases} cases, {len(self.problems)} problems",
                *self.problems[:60],
            ]
        )


def crash_points(
    folder: Path, names: tuple[str, ...] = tuple(WRITES), faults: bool = True, power: bool = True
) -> Found:
    """Go through every operation of some writes.

    Args:
        faults: let operations fail, too, besides dying there.
        power: lose the power, too.
    """
    found = Found()
    original = prepared(folder / "original" / "outputs")
    for name in names:
        operations = _operations(folder, original, WRITES[name])
        found.operations[name] = len(operations)
        for number, operation in enumerate(operations, start=1):
            is_write = operation.startswith("write ")
            for when in ("before", "within") if is_write else ("before",):
                _die(folder, original, name, number, when, found)
            for said, error in FAULTS.items() if faults else ():
                for half in (False, True) if is_write else (False,):
                    _fail(folder, original, name, number, said, error, half, False, found)
            if faults:  # a disk that stays full
                _fail(
                    folder,
                    original,
                    name,
                    number,
                    "no space",
                    FAULTS["no space"],
                    True,
                    True,
                    found,
                )
        _die(folder, original, name, len(operations), "after", found)
        if power:
            _lose_power(folder, original, name, found)
    return found


def _judged(write: Write, run: RunFolder, succeeded: bool) -> str:
    """What is wrong in a folder; also when it cannot even be looked at."""
    try:
        return write.judge(run, succeeded)
    except Exception as error:
        return f"what is left cannot be used: {type(error).__name__}: {error}"


def _copy(folder: Path, original: RunFolder) -> RunFolder:
    """The prepared run anew."""
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(original.path.parent, place / "outputs")
    return RunFolder(place / "outputs" / original.name)


def _operations(folder: Path, original: RunFolder, write: Write) -> list[str]:
    run = _copy(folder, original)
    operations = DiskOperations(run.path.parent, lambda number, name, path, call: call())
    with operations.watched():
        write.do(run)
    return operations.names


def _die(
    folder: Path, original: RunFolder, name: str, number: int, when: str, found: Found
) -> None:
    run, log = _copy(folder, original), folder / "log"

    def work() -> int:
        with DiskOperations(run.path.parent, die_at(number, when)).watched():
            WRITES[name].do(run)
        return 0

    status = ended(forked(work, log))
    found.cases += 1
    problem = _judged(WRITES[name], run, False)
    if status != DIED:
        problem = f"it ended with {status}: {tail(log)}"
    if problem:
        found.problems.append(f"{name}, dead {when} operation {number}: {problem}")


def _fail(
    folder: Path,
    original: RunFolder,
    name: str,
    number: int,
    said: str,
    error: int,
    half: bool,
    ever_after: bool,
    found: Found,
) -> None:
    run = _copy(folder, original)
    operations = DiskOperations(run.path.parent, fail_at(number, error, half, ever_after))
    succeeded, problem = False, ""
    try:
        with operations.watched():
            WRITES[name].do(run)
        succeeded = True
    except UserError:
        pass
    except Exception as raised:
        problem = f"it is no sentence, but {type(raised).__name__}: {raised}"
    found.cases += 1
    problem = _judged(WRITES[name], run, succeeded) or problem
    if problem:
        found.problems.append(f"{name}, {said} at operation {number}: {problem}")


def _lose_power(folder: Path, original: RunFolder, name: str, found: Found) -> None:
    """After every operation: what a disk holds that has forgotten all that was not forced on it."""
    run, seen = _copy(folder, original), folder / "images"

    def work() -> int:  # in a process that is no more afterwards, as its names say who wrote
        power = PowerLoss(run.path.parent)
        with DiskOperations(run.path.parent, power.on_operation).watched():
            WRITES[name].do(run)
        seen.write_bytes(pickle.dumps(power.images))
        return 0

    status = ended(forked(work, folder / "log"))
    assert status == 0, tail(folder / "log")
    every = pickle.loads(seen.read_bytes())
    for number, images in enumerate(every, start=1):
        for kind, image in images.items():
            place = folder / "case"
            shutil.rmtree(place, ignore_errors=True)
            PowerLoss.write(image, place / "outputs")
            found.cases += 1
            succeeded = number == len(every)
            problem = _judged(WRITES[name], RunFolder(place / "outputs" / run.name), succeeded)
            if problem:
                found.problems.append(
                    f"{name}, no power after operation {number} ({kind}): {problem}"
                )


def memory_disk() -> str | None:
    """A disk in memory, where there is one, on which an fsync costs nothing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> int:
    """All crash points as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="deaths in the save of a checkpoint")
    parser.add_argument("--broken", choices=list(BROKEN), help="with a saver that is not ours")
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=memory_disk()) as folder:
        names = ("checkpoint",) if chosen.quick else tuple(WRITES)
        if chosen.broken:
            BROKEN[chosen.broken]()
        found = crash_points(Path(folder), names, faults=not chosen.quick)
    print(found.told())
    print(f"{time.monotonic() - started:.0f} s")
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
