"""Changes to a data set: undone, done again, whole after a crash."""

from pathlib import Path

import pytest

from lora_sd.ui.data import history
from lora_sd.ui.data.history import History


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"picture")
    (folder / "a.txt").write_bytes(b"one")
    return folder


@pytest.fixture
def changes(data_set: Path, tmp_path: Path) -> History:
    return History(data_set, tmp_path / "changes")


def holds(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_any_change_is_undone_and_done_again(
    changes: History, data_set: Path, tmp_path: Path
) -> None:
    (tmp_path / "new.png").write_bytes(b"another")
    states = [holds(data_set)]
    for files in (
        {"a.txt": b"two"},
        {"sub/b.png": tmp_path / "new.png", "sub/b.txt": b"b"},
        {"a.png": None, "a.txt": None},
    ):
        changes.change(f"what {len(states)}", {"n": len(states)}, files)
        states.append(holds(data_set))
    assert states[-1] == {"sub/b.png": b"another", "sub/b.txt": b"b"}
    for _ in range(2):
        for number in (2, 1, 0):
            undone = changes.undo()
            assert undone and undone.values == {"n": number + 1}
            assert holds(data_set) == states[number]
        assert changes.undo() is None and changes.to_undo() is None
        for number in (1, 2, 3):
            redone = changes.redo()
            assert redone and redone.what == f"what {number}"
            assert holds(data_set) == states[number]
        assert changes.redo() is None


def test_a_new_change_forgets_what_was_undone(changes: History, data_set: Path) -> None:
    changes.change("one", {}, {"a.txt": b"two"})
    changes.undo()
    changes.change("other", {}, {"a.txt": b"three"})
    assert changes.to_redo() is None
    changes.undo()
    assert holds(data_set)["a.txt"] == b"one"


def test_edits_of_one_caption_are_one_change(
    changes: History, data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in (b"t", b"tw", b"two"):
        changes.change("edited", {"name": "a.png"}, {"a.txt": text})
    changes.undo()
    assert holds(data_set)["a.txt"] == b"one" and changes.to_undo() is None
    changes.redo()
    assert holds(data_set)["a.txt"] == b"two"
    monkeypatch.setattr(history, "ONE_EDIT_S", 0.0)
    changes.change("edited", {"name": "a.png"}, {"a.txt": b"three"})
    changes.undo()
    assert holds(data_set)["a.txt"] == b"two"


def test_a_crash_in_the_middle_loses_nothing(
    changes: History, data_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = holds(data_set)
    monkeypatch.setattr(History, "_put", lambda *_: pytest.fail("crash"))
    with pytest.raises(pytest.fail.Exception):
        changes.change("removed", {}, {"a.png": None, "a.txt": None})
    monkeypatch.undo()
    (data_set / "a.png").unlink()  # half of it was done
    changes.undo()
    assert holds(data_set) == before


def test_damage_and_old_changes_are_passed_over(
    changes: History, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST_KEPT", 3)
    for number in range(5):
        changes.change(f"{number}", {}, {"a.txt": str(number).encode()})
    assert len(list((tmp_path / "changes").iterdir())) == 3
    newest = sorted((tmp_path / "changes").iterdir())[-1]
    (newest / "change.json").write_text("{")
    last = changes.to_undo()
    assert last and last.what == "3"
    changes.change("next", {}, {"a.txt": b"next"})
    changes.undo()
    assert holds(data_set)["a.txt"] == b"4"
