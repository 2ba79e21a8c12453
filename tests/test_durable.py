"""Files and folders appear whole or not at all."""

import os

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
