"""A full disk costs no finished checkpoint, and what only tells of a run does not end it.

The letters are rows of the table of faults: B disk and files.
"""

import errno
import logging
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train_sd_lora
from lora_sd import checkpoint, durable, samples
from lora_sd import train as trainer
from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.checkpoint import Identity
from lora_sd.config import config_from_values
from lora_sd.errors import DiskFull, RunError
from lora_sd.run_folder import RunFolder, create_run
from lora_sd.run_record import RunRecord
from lora_sd.train_step import TrainStep

IDENTITY = Identity({"train": {"steps": 9}}, {"a.png": "1"}, "base", 2)
LAYER = "unet.mid_block.attentions.0.proj_in"


def save(run: RunFolder, step: int, **options) -> Path:
    """Save some 70 kB."""
    adapter = Adapter({LAYER: LoRAWeights(torch.ones(8, 512), torch.ones(512, 8), 2.0)})
    state = {"optimizer": {"exp_avg": torch.full((10_000,), float(step))}}
    return checkpoint.save(run, step, adapter, state, IDENTITY, 2, **options)


def steps(run: RunFolder) -> list[int]:
    """The steps of all folders there, each of which is whole."""
    found = sorted(run.checkpoints.iterdir())
    for folder in found:
        checkpoint._read_manifest(folder)
    return [checkpoint.step_of(folder) for folder in found]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting wants rights")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def no_look_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the disk filled after the look at its free space."""
    monkeypatch.setattr(checkpoint, "SPARE_BYTES", 0)
    monkeypatch.setattr(checkpoint, "TIMES_LAST", 0)


def fill_up(disk: Path, left_bytes: int) -> Path:
    free = shutil.disk_usage(disk).free
    filler = disk / "filler"
    filler.write_bytes(b"x" * max(0, free - left_bytes))
    return filler


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("left_kb", [0, 4, 20, 40, 60, 76])
def test_a_save_that_finds_no_room_b1(
    small_disk: Path, no_look_ahead: None, nth: int, left_kb: int
) -> None:
    run = create_run(small_disk, "run", "run", "train: {}")
    for step in range(1, nth):
        save(run, step)
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    filler = fill_up(small_disk, left_kb * 1024)
    with pytest.raises(DiskFull, match="No space left on device.*Make room") as caught:
        save(run, nth)
    assert caught.value.exit_status == 5 and f"--resume '{run.path}'" in str(caught.value)
    assert {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()} == before
    assert steps(run) == list(range(1, nth)) and list(run.path.rglob(".tmp*")) == []
    filler.unlink()
    save(run, nth)
    assert steps(run)[-1] == nth


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
def test_a_file_that_may_not_grow_so_large_b2(tmp_path: Path, name: str, share: float) -> None:
    run = create_run(tmp_path, "run", "run", "train: {}")
    size = (save(run, 1) / name).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size * share), limits[1]))
    try:
        with pytest.raises(DiskFull, match="could not be written: File too large"):
            save(run, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(run) == [1]


def test_room_is_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = create_run(tmp_path, "run", "run", "train: {}")
    size = sum(file.stat().st_size for file in save(run, 1).iterdir())
    wanted = 2 * size + 64 * 2**20
    free = [wanted - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))
    monkeypatch.setattr(durable, "write_folder", None)
    with pytest.raises(DiskFull, match=r"has 67.* of free disk, and a checkpoint wants 67"):
        save(run, 2)
    monkeypatch.undo()
    free[0] = wanted
    save(run, 2)
    assert steps(run) == [1, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.EROFS])
def test_other_failures_of_the_disk_are_not_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    run = create_run(tmp_path, "run", "run", "train: {}")
    save(run, 1)

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=f"{os.strerror(number)}. Earlier ones .* whole") as caught:
        save(run, 2, wait=lambda _: pytest.fail("waited"))
    assert not isinstance(caught.value, DiskFull) and steps(run) == [1]


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_save_waits_for_room_where_it_may_b3(
    small_disk: Path, request: pytest.FixtureRequest, looks_ahead: bool
) -> None:
    if not looks_ahead:
        request.getfixturevalue("no_look_ahead")
    run = create_run(small_disk, "run", "run", "train: {}")
    filler = fill_up(small_disk, 20_000)
    asked: list[str] = []

    def wait(why: str) -> bool:
        asked.append(why)
        if len(asked) == 3:
            filler.unlink()
            checkpoint.SPARE_BYTES, spare = 0, checkpoint.SPARE_BYTES
            request.addfinalizer(lambda: setattr(checkpoint, "SPARE_BYTES", spare))
        return True

    save(run, 1, wait=wait)
    assert len(asked) == 3 and steps(run) == [1]
    assert ("of free disk" if looks_ahead else "No space left") in asked[0]


def test_waiting_ends_when_the_run_is_to_stop(tmp_path: Path, monkeypatch) -> None:
    run = create_run(tmp_path, "run", "run", "train: {}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with RunRecord(run, 9, True) as record:
        stopping = [False, False, False, True]
        wait = record.wait_for_room(lambda: stopping.pop(0) if len(stopping) > 1 else True)
        with pytest.raises(DiskFull, match="Make room"):
            save(run, 1, wait=wait)
        assert "waiting for room" in run.read_status().message
    assert "waits until there is room" in run.log_file.read_text()


def train(settings: dict[str, dict]) -> RunFolder:
    assert trainer.train(config_from_values(settings), "run") == 0
    return RunFolder(Path(settings["output"]["folder"]) / settings["output"]["name"])


def losses(run: RunFolder) -> list[float]:
    return [record["loss"] for record in run.read_metrics()]


def plain(value: object) -> object:
    """Tensors as their bytes, which are equal only to the bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.reshape(-1).contiguous().view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def saved(run: RunFolder, step: int) -> object:
    """Adapter and states of a checkpoint, comparable to the bit."""
    folder = run.checkpoint(step)
    state = torch.load(folder / checkpoint.STATE, weights_only=True)
    return plain([load_file(folder / checkpoint.ADAPTER), state])


def straight(run_settings: dict[str, dict]) -> RunFolder:
    """An uninterrupted run; the settings are those of one of the same name elsewhere then."""
    run = train(run_settings)
    run_settings["output"]["folder"] += "-full"
    return run


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("on_full_disk", ["stop", "wait"])
def test_a_run_stops_or_waits_and_is_the_same_run_b1_b3(
    run_settings, monkeypatch, on_full_disk: str
) -> None:
    run_settings["output"]["on_full_disk"] = on_full_disk
    uninterrupted = straight(run_settings)
    run = RunFolder(Path(run_settings["output"]["folder"]) / "run")
    full = threading.Event()
    full.set()
    usage = shutil.disk_usage

    def disk_usage(path):
        is_full = full.is_set() and (run.checkpoint(2)).exists()
        return SimpleNamespace(free=0) if is_full else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    if on_full_disk == "stop":
        with pytest.raises(DiskFull):
            train(run_settings)
        assert run.read_status().state == "failed" and steps(run) == [2]
        full.clear()
        assert train_sd_lora.main(["--resume", str(run.path)]) == 0
    else:
        seen = []

        def watch():
            until = time.monotonic() + 60
            while time.monotonic() < until and not seen:
                status = run.read_status()
                if status and "waiting for room" in status.message:
                    seen.append(status)
                time.sleep(0.01)
            full.clear()

        watcher = threading.Thread(target=watch)
        watcher.start()
        train(run_settings)
        watcher.join()
        assert seen and seen[0].state == "saving"
    assert losses(run) == losses(uninterrupted)
    assert saved(run, 6) == saved(uninterrupted, 6)
    assert run.adapter_file.read_bytes() == uninterrupted.adapter_file.read_bytes()


def test_what_tells_of_a_run_may_find_no_room_b4(run_settings, monkeypatch) -> None:
    run_settings["sample"] = {"prompts": ["a red wall"], "steps": 2, "every_steps": 3}
    uninterrupted = straight(run_settings)
    append, told = RunFolder.append_metrics, []

    def append_now_and_then(self, values):
        if len(told) < 6:
            told.append(values["step"])
            no_space()
        append(self, values)

    monkeypatch.setattr(RunFolder, "append_metrics", append_now_and_then)
    monkeypatch.setattr(RunFolder, "write_status", no_space)
    monkeypatch.setattr(samples, "save_picture", no_space)
    monkeypatch.setattr(samples, "write_png", no_space)
    monkeypatch.setattr(logging.FileHandler, "emit", log_to_nowhere)
    run = train(run_settings)
    assert len(told) == 6 and losses(run) == losses(uninterrupted)[: len(losses(run))]
    assert saved(run, 6) == saved(uninterrupted, 6)


def log_to_nowhere(self: logging.Handler, record: logging.LogRecord) -> None:
    try:
        no_space()
    except OSError:
        self.handleError(record)


def test_metrics_that_found_no_room_are_written_later_b4(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    run = create_run(tmp_path, "run", "run", "train: {}")
    append = RunFolder.append_metrics
    with RunRecord(run, 5, True) as record:
        record.training_from(0)
        for step, there_is_room in [(1, True), (2, False), (3, True), (4, False), (5, False)]:
            monkeypatch.setattr(RunFolder, "append_metrics", append if there_is_room else no_space)
            record.step(step, float(step), {"unet": 0.1}, 1.0, 2, {})
        assert losses(run) == [1.0, 2.0, 3.0]
        monkeypatch.setattr(RunFolder, "append_metrics", append)
        for step in (4, 5):  # again, as where it has gone back to a checkpoint
            record.step(step, float(step), {"unet": 0.1}, 1.0, 2, {})
    assert losses(run) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert capsys.readouterr().err.count("cannot be written (No space left on device)") == 1


def test_a_line_is_written_whole_or_not_at_all_b4(small_disk: Path) -> None:
    run = create_run(small_disk, "run", "run", "train: {}")
    run.append_metrics({"step": 1, "loss": 0.5})
    run.metrics_file.write_text(run.metrics_file.read_text() * 150)
    filler = fill_up(small_disk, 0)
    with pytest.raises(OSError):
        run.append_metrics({"step": 2, "text": "x" * 8000})
    assert len(run.read_metrics()) == 150
    filler.unlink()
    run.append_metrics({"step": 2, "loss": 0.5})
    assert run.read_metrics()[-1]["step"] == 2 and len(run.read_metrics()) == 151


def test_a_full_disk_at_the_end_costs_the_result_and_no_training_b5(
    run_settings, monkeypatch
) -> None:
    uninterrupted = straight(run_settings)
    run = RunFolder(Path(run_settings["output"]["folder"]) / "run")
    staged = durable._staged

    def no_room_for_the_result(final, overwrite):
        if final == run.adapter_file:
            no_space()
        return staged(final, overwrite)

    monkeypatch.setattr(durable, "_staged", no_room_for_the_result)
    with pytest.raises(DiskFull) as caught:
        train(run_settings)
    assert "adapter.safetensors' could not be written" in str(caught.value)
    assert steps(run) == [4, 6] and not run.adapter_file.exists()
    monkeypatch.undo()
    monkeypatch.setattr(TrainStep, "gradients", None)
    assert train_sd_lora.main(["--resume", str(run.path)]) == 0
    assert run.adapter_file.read_bytes() == uninterrupted.adapter_file.read_bytes()
    assert run.read_status().state == "finished"


def test_no_run_folder_is_left_where_there_is_no_room_for_one(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DiskFull, match="cannot be made: No space left"):
        create_run(tmp_path / "outputs", "run", "run", "train: {}")
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_folder_that_goes_while_training_ends_the_run_b7(run_settings, monkeypatch) -> None:
    run_settings["output"]["save_every_steps"] = 6
    run = RunFolder(Path(run_settings["output"]["folder"]) / "run")
    append, calls = RunFolder.append_metrics, []

    def append_and_remove(self, values):
        calls.append(values["step"])
        append(self, values)
        if values["step"] == 3:
            shutil.rmtree(run.path)

    monkeypatch.setattr(RunFolder, "append_metrics", append_and_remove)
    with pytest.raises(RunError, match=f"'{run.path}' has gone"):
        train(run_settings)
    assert calls == [1, 2, 3, 4] and not run.path.exists()
