"""Checkpoints appear whole or not at all, and nothing but a whole one is gone on from.

The letters are rows of the table of faults: A crash and resume, B disk and files, C numbers.
"""

import json
import os
import random
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_sd import checkpoint
from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.checkpoint import Identity
from lora_sd.errors import BadNumbers, RunError
from lora_sd.formats import save_adapter
from lora_sd.run_folder import RunFolder, create_run

IDENTITY = Identity({"train": {"steps": 9}, "sample": {"scales": [0.0]}}, {"a.png": "1"}, "base", 2)


@pytest.fixture
def adapter() -> Adapter:
    """A linear layer and a convolution."""
    torch.manual_seed(3)
    attention, block = "unet.mid_block.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.conv1"
    return Adapter(
        {
            attention: LoRAWeights(torch.randn(2, 8), torch.randn(8, 2), 2.0),
            block: LoRAWeights(torch.randn(2, 8, 3, 3), torch.randn(8, 2, 1, 1), 1.0),
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return create_run(tmp_path, "run", "run", "train: {}")


def save(run: RunFolder, step: int, adapter: Adapter, keep: int = 2, **options) -> Path:
    state = {"optimizer": {"state": {0: torch.full((5,), float(step))}}, "schedule": {"step": step}}
    return checkpoint.save(run, step, adapter, state, IDENTITY, keep, **options)


@pytest.fixture
def saved(run: RunFolder, adapter: Adapter) -> RunFolder:
    """A run with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        save(run, step, adapter)
    return run


def newest_step(run: RunFolder) -> int | None:
    found, _ = checkpoint.find_newest(run)
    return found and found.step


def content(run: RunFolder) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_passed_over(run: RunFolder, reason: str) -> None:
    """The newest is rejected with that reason, and the one before it is whole."""
    found, rejected = checkpoint.find_newest(run)
    assert found and found.step == 2
    assert len(rejected) == 1 and reason in str(rejected[0]) and "step_000004" in str(rejected[0])


def test_what_is_saved_is_read_again(saved: RunFolder, adapter: Adapter) -> None:
    found, rejected = checkpoint.find_newest(saved)
    assert found and not rejected and found.step == 4
    assert found.identity() == IDENTITY
    assert found.state(torch.device("cpu"))["schedule"] == {"step": 4}
    shapes = {name: layer.weight_shape for name, layer in adapter.layers.items()}
    read = found.adapter(shapes)
    assert all(torch.equal(read.layers[name].up, adapter.layers[name].up) for name in shapes)
    assert set(found.manifest["versions"]) >= {"torch", "diffusers", "transformers", "accelerate"}
    assert names(found.folder) == sorted([*checkpoint.FILES, checkpoint.MANIFEST])


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_missing_file_a3(saved: RunFolder, name: str) -> None:
    (saved.checkpoint(4) / name).unlink()
    assert_passed_over(saved, f"{name} is missing")


@pytest.mark.parametrize("name", checkpoint.FILES)
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_file_cut_short_a4(saved: RunFolder, name: str, left: float) -> None:
    file = saved.checkpoint(4) / name
    size = file.stat().st_size
    os.truncate(file, int(size * left) if 0 < left < 1 else left % size)
    assert_passed_over(saved, f"{name} is damaged")


@pytest.mark.parametrize("name", checkpoint.FILES)
def test_a_flipped_bit_a5(saved: RunFolder, name: str) -> None:
    file = saved.checkpoint(4) / name
    whole = file.read_bytes()
    for place in (0, len(whole) - 1, *random.Random(5).sample(range(len(whole)), 5)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert_passed_over(saved, f"{name} is damaged")
    file.write_bytes(whole)
    assert newest_step(saved) == 4


def test_any_flipped_bit_of_the_manifest_a5(saved: RunFolder) -> None:
    """It is passed over, or says the same: one blank between words is as good as another."""
    file = saved.checkpoint(4) / checkpoint.MANIFEST
    whole = file.read_bytes()
    meaning, passed_over = json.loads(whole), 0
    places = range(0, len(whole), 7)
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        found, rejected = checkpoint.find_newest(saved)
        passed_over += len(rejected)
        assert found and (rejected or found.manifest == meaning)
    assert passed_over > 0.7 * len(places)


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "no manifest"),
        ("", "manifest is damaged"),
        ("[]", "manifest is damaged"),
        ("{}", "manifest is damaged"),
        ("[" * 100_000, "manifest is damaged"),
        ('{"format": 99}', "a newer version of lora_sd (format 99"),
        ('{"format": 1}', "an older version of lora_sd (format 1"),
        ('{"format": "1"}', "manifest is damaged"),
    ],
)
def test_a_manifest_that_is_none_a6(saved: RunFolder, text: str | None, reason: str) -> None:
    file = saved.checkpoint(4) / checkpoint.MANIFEST
    file.unlink() if text is None else file.write_text(text)
    assert_passed_over(saved, reason)


def test_a_manifest_of_another_step_a6(saved: RunFolder) -> None:
    saved.checkpoint(4).rename(saved.checkpoint(7))
    found, rejected = checkpoint.find_newest(saved)
    assert found and found.step == 2 and "of another step, 4" in str(rejected[0])


def test_all_damaged_is_an_error_and_nothing_is_changed_a7(saved: RunFolder) -> None:
    for step in (2, 4):
        (saved.checkpoint(step) / checkpoint.STATE).write_bytes(b"")
    before = content(saved)
    with pytest.raises(RunError) as caught:
        checkpoint.find_newest(saved)
    said = "\n".join(caught.value.problems)
    assert "nothing was changed" in said and "step_000002" in said and "step_000004" in said
    assert content(saved) == before


def test_an_adapter_is_no_checkpoint_a17(saved: RunFolder, adapter: Adapter) -> None:
    for step in (6, 8):
        saved.checkpoint(step).mkdir()
        save_adapter(adapter, saved.checkpoint(step) / checkpoint.ADAPTER, torch.float32)
    save_adapter(adapter, saved.checkpoint(8) / checkpoint.STATE, torch.float32)
    manifest = (saved.checkpoint(4) / checkpoint.MANIFEST).read_text()
    (saved.checkpoint(8) / checkpoint.MANIFEST).write_text(manifest)
    found, rejected = checkpoint.find_newest(saved)
    assert found and found.step == 4
    assert [one.folder.name for one in rejected] == ["step_000008", "step_000006"]


def test_newest_is_by_step_and_not_by_the_clock_b13(run: RunFolder, adapter: Adapter) -> None:
    for age, step in enumerate((2, 10, 999_998, 1_000_000)):
        folder = save(run, step, adapter, keep=9)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (10_000 - age, 10_000 - age))
    assert newest_step(run) == 1_000_000


def test_the_order_in_which_things_reach_the_disk_b12(
    saved: RunFolder, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of files < fsync of the folder < rename < fsync of its parent < first removal."""
    done: list[tuple[str, str]] = []

    def place(handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def spy(name: str, where) -> None:
        original = getattr(os, name)

        def call(*arguments, **options):
            done.append((name, where(*arguments, **options)))
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, call)

    def removed(path, *, dir_fd=None):
        return os.path.join(place(dir_fd) if dir_fd is not None else "", path)

    spy("fsync", place)
    spy("replace", lambda source, target: f"{source} -> {target}")
    spy("unlink", removed)
    spy("rmdir", removed)
    save(saved, 6, adapter)
    final = str(saved.checkpoint(6))
    rename = next(n for n, (what, where) in enumerate(done) if where.endswith(f"-> {final}"))
    staged = done[rename][1].split(" -> ")[0]
    last = {entry: number for number, entry in enumerate(done)}
    files = [last["fsync", f"{staged}/{name}"] for name in names(Path(final))]
    folder = last["fsync", staged]
    parent = done.index(("fsync", str(saved.checkpoints)))
    removal = next(n for n, (_, where) in enumerate(done) if str(saved.checkpoint(2)) in where)
    assert max(files) < folder < rename < parent < removal
    assert len(files) == 4
    assert newest_step(saved) == 6 and names(saved.checkpoints) == ["step_000004", "step_000006"]


def test_the_manifest_is_written_last(
    run: RunFolder, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = []
    original = checkpoint._write_manifest

    def write(folder, *arguments):
        there.append(names(folder))
        original(folder, *arguments)

    monkeypatch.setattr(checkpoint, "_write_manifest", write)
    save(run, 2, adapter)
    assert there == [sorted(checkpoint.FILES)]


def test_two_are_kept_and_strangers_stay(saved: RunFolder, adapter: Adapter) -> None:
    (saved.checkpoints / "step_000002 copy").mkdir()
    (saved.checkpoints / "step_notes").write_text("mine")
    for step in (6, 8):
        save(saved, step, adapter)
    assert names(saved.checkpoints) == [
        "step_000002 copy", "step_000006", "step_000008", "step_notes",
    ]  # fmt: skip


def test_files_have_the_umasks_mode_b10(run: RunFolder, adapter: Adapter) -> None:
    before = os.umask(0o027)
    try:
        folder = save(run, 2, adapter)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o640}


def test_checkpoints_may_be_a_link_to_another_disk_b10(
    run: RunFolder, adapter: Adapter, tmp_path: Path
) -> None:
    run.checkpoints.rmdir()
    (tmp_path / "large").mkdir()
    run.checkpoints.symlink_to(tmp_path / "large")
    for step in (2, 4, 6):
        save(run, step, adapter)
    assert run.checkpoints.is_symlink() and newest_step(run) == 6
    assert names(tmp_path / "large") == ["step_000004", "step_000006"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_written_c4(
    saved: RunFolder, adapter: Adapter, value: float
) -> None:
    before = content(saved)
    name, layer = next(iter(adapter.layers.items()))
    up = layer.up.clone()
    up.view(-1)[-1] = value
    with pytest.raises(BadNumbers, match="no finite numbers, such as 'unet") as caught:
        save(saved, 6, Adapter({**adapter.layers, name: replace(layer, up=up)}))
    assert caught.value.exit_status == 6
    state = {"optimizer": {"state": {0: {"exp_avg": torch.tensor([1.0, value])}}}, "other": {}}
    with pytest.raises(BadNumbers, match="state of 'optimizer' are no finite"):
        checkpoint.save(saved, 6, adapter, state, IDENTITY, 2)
    assert content(saved) == before
    assert names(saved.checkpoints) == ["step_000002", "step_000004"]


def test_a_whole_checkpoint_of_that_step_is_left_and_a_damaged_one_made_again(
    saved: RunFolder, adapter: Adapter
) -> None:
    before = content(saved)
    save(saved, 4, adapter)
    assert content(saved) == before
    (saved.checkpoint(4) / checkpoint.ADAPTER).write_bytes(b"")
    save(saved, 4, adapter)
    assert newest_step(saved) == 4


def test_a_damaged_one_is_set_aside_and_does_not_count_as_kept(
    saved: RunFolder, adapter: Adapter
) -> None:
    (saved.checkpoints / "damaged_step_000004").mkdir()
    (saved.checkpoint(4) / checkpoint.STATE).unlink()
    _, rejected = checkpoint.find_newest(saved)
    checkpoint.set_aside(rejected[0])
    save(saved, 5, adapter)
    assert names(saved.checkpoints) == [
        "damaged_step_000004", "damaged_step_000004-2", "step_000002", "step_000005",
    ]  # fmt: skip


def test_leftovers_are_removed_and_counted_a21(saved: RunFolder) -> None:
    left = saved.checkpoints / ".tmp-step_000006-0-1-2"
    left.mkdir()
    (left / checkpoint.STATE).write_bytes(b"half")
    (saved.path / ".tmp-status-1.json").touch()
    (saved.samples / ".tmp-step_000002_00.png-0-1-2").touch()
    assert checkpoint.clean(saved) == 3
    assert list(saved.path.rglob(".tmp*")) == [] and newest_step(saved) == 4


def test_a_folder_that_has_gone_is_not_made_again_b7(saved: RunFolder, adapter: Adapter) -> None:
    saved.path.rename(saved.path.with_name("moved"))
    with pytest.raises(RunError, match=f"'{saved.path}' has gone"):
        save(saved, 6, adapter)
    saved.path.write_text("a file in its place")
    with pytest.raises(RunError, match="has gone"):
        save(saved, 6, adapter)
    assert saved.path.is_file()
