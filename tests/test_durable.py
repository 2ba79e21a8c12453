"""Files and folders appear whole or not at all."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_sd import durable
from lora_sd.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    durable.write_text(file, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        durable.write_text(file, "new")
    assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_symbolic_link_stays_and_its_target_is_updated(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    durable.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_folder_that_fails_half_way_never_appears(tmp_path):
    def fill(folder):
        (folder / "one").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        durable.write_folder(tmp_path / "final", fill)
    assert names(tmp_path) == []


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))

    def fill(folder):
        (folder / "one").write_text("1")
        (folder / "two").write_text("2")

    durable.write_folder(tmp_path / "final", fill)
    assert done == ["fsync", "fsync", "fsync", "rename", "fsync"]  # files, folder, rename, parent
    assert names(tmp_path / "final") == ["one", "two"]


@pytest.mark.parametrize("refusals", [1, 3, 60])
def test_a_file_that_windows_holds_is_tried_again(tmp_path, monkeypatch, refusals):
    left, rename = [refusals], os.replace

    def held(source, target):
        if left[0]:
            left[0] -= 1
            error = PermissionError(13, "held by another program")
            error.winerror = 32
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(durable.time, "sleep", lambda _: None)
    file = tmp_path / "a.txt"
    file.write_text("old")
    if refusals < 50:
        durable.write_text(file, "new")
        assert file.read_text() == "new"
    else:
        with pytest.raises(UserError, match="held by another program"):
            durable.write_text(file, "new")
        assert file.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_link_to_a_folder_stays_and_the_folder_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with durable.staged(tmp_path / "link") as folder:
        folder.mkdir()
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["new"]
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("has_links", [False, True])
def test_what_has_come_meanwhile_stays(is_folder, has_links, tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError(1, "Operation not permitted")

    def make(path, text):
        if is_folder:
            path.mkdir()
        (path / "a" if is_folder else path).write_text(text)

    if not has_links:
        monkeypatch.setattr(os, "link", none)
    final = tmp_path / "x"
    with (
        pytest.raises(UserError, match="meanwhile"),
        durable.staged(final, overwrite=False) as path,
    ):
        make(path, "mine")
        make(final, "theirs")
    assert (final / "a" if is_folder else final).read_text() == "theirs"
    assert names(tmp_path) == ["x"]
    final.rename(tmp_path / "y")
    with durable.staged(final, overwrite=False) as path:
        make(path, "mine")
    assert names(tmp_path) == ["x", "y"]


def test_what_a_killed_process_had_set_aside_is_put_back(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    machine = durable._machine()
    (tmp_path / f".tmp-x-{machine}-{process.pid}-0123abcd").mkdir()
    old = tmp_path / f".tmp-x-{machine}-{process.pid}-0123abcd-old"
    old.mkdir()
    (old / "a").write_text("old")
    elsewhere = tmp_path / f".tmp-x-ffffffff-{process.pid}-0123abcd"
    elsewhere.touch()
    with contextlib.suppress(KeyboardInterrupt), durable.staged(tmp_path / "x"):
        raise KeyboardInterrupt
    assert names(tmp_path) == [elsewhere.name, "x"] and names(tmp_path / "x") == ["a"]


def test_a_number_that_a_later_process_has_is_no_owner(tmp_path):
    leftover = tmp_path / f".tmp-x-{durable._machine()}-{os.getpid()}-0123abcd"
    leftover.touch()
    os.utime(leftover, (1, 1))
    durable.write_text(tmp_path / "x", "")
    assert names(tmp_path) == ["x"]


def test_long_names(tmp_path):
    durable.write_text(tmp_path / ("a" * 255), "whole")
    durable.write_text(tmp_path / ("ü" * 127), "whole")
    assert len(names(tmp_path)) == 2
    with pytest.raises(UserError, match="too long"):
        durable.write_text(tmp_path / ("a" * 256), "")
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    "name, said", [("", "no name"), ("a" * 256, "too long"), ("\udcff", "no Unicode")]
)
def test_places_that_no_file_can_have(name, said):
    with pytest.raises(UserError, match=said):
        durable.check_place(Path(name))
    durable.check_place(Path("none/none"))
