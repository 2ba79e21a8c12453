"""Stores: what was put in comes out bit for bit, and what is damaged does not come out at all."""

import errno
import hashlib
import os
import stat
import time
from multiprocessing import Process
from pathlib import Path

import pytest
import torch

from lora_sd.data import store as stores
from lora_sd.data.store import DiskStore, MemoryStore
from lora_sd.errors import UserError


def key_of(name):
    return hashlib.sha256(str(name).encode()).hexdigest()


KEY = key_of("an entry")


def entry(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "mean": torch.randn(4, 1, 2, generator=draw),
        "deviation": torch.rand(4, 1, 2, generator=draw),
        "mask": torch.rand(1, 1, 2, generator=draw),
    }


def is_same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one
    )


def files_of(folder):
    return [file for file in Path(folder).rglob("*") if file.is_file()]


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    return MemoryStore() if request.param == "memory" else DiskStore(tmp_path / "a" / "cache")


def test_what_was_put_in_comes_out(store):
    assert store.get(KEY) is None
    store.put(KEY, entry())
    assert is_same(store.get(KEY), entry()) and store.get(key_of("another")) is None
    store.put(KEY, entry(1))
    assert is_same(store.get(KEY), entry(1)) and store.damaged == 0


def test_entries_on_disk_are_there_for_the_next_run(tmp_path):
    DiskStore(tmp_path).put(KEY, entry())
    assert is_same(DiskStore(tmp_path).get(KEY), entry())
    assert len(files_of(tmp_path)) == 1


def test_any_flipped_bit_is_noticed(tmp_path):
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    (file,) = files_of(tmp_path)
    whole = file.read_bytes()
    for place in range(len(whole)):
        spoiled = bytearray(whole)
        spoiled[place] ^= 1 << place % 8
        file.write_bytes(spoiled)
        assert store.get(KEY) is None, place
    assert store.damaged == len(whole)
    file.write_bytes(whole)
    assert is_same(store.get(KEY), entry())


def test_any_lost_or_added_end_is_noticed(tmp_path):
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    (file,) = files_of(tmp_path)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert store.get(KEY) is None, length
    file.write_bytes(whole + b"\0")
    assert store.get(KEY) is None and store.damaged == len(whole) + 1


@pytest.mark.parametrize("kind", ["foreign", "of another key", "of another version", "a folder"])
def test_what_is_not_the_entry_is_made_anew(tmp_path, monkeypatch, kind):
    store = DiskStore(tmp_path)
    store.put(KEY, entry())
    (file,) = files_of(tmp_path)
    match kind:
        case "foreign":
            file.write_bytes(b"GIF89a" * 50)
        case "of another key":
            store.put(key_of("another"), entry(1))
            (other,) = (one for one in files_of(tmp_path) if one != file)
            os.replace(other, file)
        case "of another version":
            monkeypatch.setattr(stores, "VERSION", b"lora_sd cache 0")
        case "a folder":
            file.unlink()
            file.mkdir()
    assert store.get(KEY) is None and store.damaged == 1
    if kind == "a folder":
        file.rmdir()
    store.put(KEY, entry(2))
    assert is_same(store.get(KEY), entry(2)) and store.damaged == 1


def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = DiskStore(tmp_path / "cache")
    store.put(KEY, entry())
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"cache' cannot be written: No space left.*Make room"):
        store.put(key_of("another"), entry(1))
    monkeypatch.undo()
    assert len(files_of(tmp_path)) == 1 and is_same(store.get(KEY), entry())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="wants a disk that is always full")
def test_a_write_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    store = DiskStore(tmp_path)
    with open("/dev/full", "wb") as full:
        monkeypatch.setattr(stores, "open", lambda path, mode: full, raising=False)
        with pytest.raises(UserError, match="No space left"):
            store.put(KEY, entry())
    assert files_of(tmp_path) == [] and store.get(KEY) is None


def test_a_cache_folder_that_is_a_file_is_told(tmp_path):
    (tmp_path / "cache").write_text("mine")
    store = DiskStore(tmp_path / "cache")
    assert store.get(KEY) is None
    with pytest.raises(UserError, match="cache' cannot be written"):
        store.put(KEY, entry())
    assert (tmp_path / "cache").read_text() == "mine"


def test_leftovers_of_killed_writes_are_swept_when_they_are_old(tmp_path):
    old, young, foreign = (tmp_path / name for name in (".tmp-old", ".tmp-young", "notes.txt"))
    for file in (old, young, foreign):
        file.write_text("half")
    for file in (old, foreign):
        os.utime(file, (time.time() - 7200,) * 2)
    DiskStore(tmp_path)
    assert sorted(files_of(tmp_path)) == sorted([young, foreign])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_files_have_the_umask_s_mode(tmp_path):
    before = os.umask(0o027)
    try:
        DiskStore(tmp_path).put(KEY, entry())
    finally:
        os.umask(before)
    (file,) = files_of(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def put_again_and_again(folder):
    store = DiskStore(folder)
    for number in list(range(4)) * 150:
        found = store.get(key_of(number))
        assert found is None or is_same(found, entry(number))
        store.put(key_of(number), entry(number))
    assert store.damaged == 0


def test_processes_share_a_folder(tmp_path):
    writers = [Process(target=put_again_and_again, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len(files_of(tmp_path)) == 4


def test_many_entries_are_checked_quickly(tmp_path):
    store = DiskStore(tmp_path)
    for number in range(2000):
        store.put(key_of(number), entry())
    began = time.process_time()
    assert all(store.get(key_of(number)) for number in range(2000))
    assert time.process_time() - began < 1.5  # 0.05 s were measured
