"""Garbage at every event of the page, over HTTP: refused in words that tell nothing of this
machine, and nothing is written where it should not be."""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_sd.ui.launch import PROJECT
from tests.ui_app import Served, served

SECRET = "the words of another run"
OURS = re.compile(r'File "[^"]*/(lora_sd/[^"]+)", line \d+, in (\w+)')
TELLING = ("Traceback", "site-packages", "root:x:0")
OF_TOOLS = {".git", ".venv", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}


def file_data(path: object) -> dict[str, Any]:
    """A file as a page names one that it has uploaded."""
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}, "orig_name": "x.png"}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    outputs = tmp_path_factory.mktemp("faults") / "outputs"
    run = outputs / "run"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text("base: {model: tiny-sd}")
    (run / "secret.txt").write_text(SECRET)
    (run / "adapter.safetensors").write_bytes(b"none")
    with served(outputs) as app:
        yield app


@pytest.fixture(scope="module")
def garbage(app: Served) -> list[Any]:
    """Every wrong type, numbers that are none, paths, oversize text, files never uploaded."""
    secret, etc = file_data(app.outputs / "run" / "secret.txt"), file_data("/etc/passwd")
    return [
        None, True, -1, 1e308, math.nan, math.inf, "../../etc/passwd", "/etc/passwd", "\0",
        "<script>alert(1)</script>{0.__class__}", "x" * 50_000, [[["x"]]], {"a": 1}, [],
        {"__type__": "update", "value": 1}, secret, [secret], etc, [etc], {"composite": etc},
    ]  # fmt: skip


def beside(app: Served) -> set[tuple[str, int]]:
    """The files of the project and what lies beside the outputs folder, with their times."""
    skipped = {app.outputs, PROJECT / "outputs"}
    found = set()
    for place in (app.outputs.parent, PROJECT):
        for folder, inner, names in os.walk(place):
            inner[:] = [
                name for name in inner if name not in OF_TOOLS and Path(folder, name) not in skipped
            ]
            found |= {
                (file, os.stat(file).st_mtime_ns) for file in (f"{folder}/{n}" for n in names)
            }
    return found


def told(app: Served, answer: str) -> list[str]:
    """What an answer tells of this machine: a path, a traceback, another run's words.

    Addresses of files in Gradio's own folder are how the page shows its pictures.
    """
    kept = answer.replace(str(app.outputs / ".gradio"), "")
    words = (*TELLING, str(app.outputs), str(PROJECT), SECRET)
    return [word for word in words if word in kept]


@pytest.mark.parametrize("apart", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_garbage_at_every_event(app: Served, garbage: list[Any], capfd: Any, apart: int) -> None:
    before, found = beside(app), []
    for number, fn in app.page.fns.items():
        if fn.fn is None:
            continue
        # in other turns the inputs get other garbage; the first one tells events apart
        turns = range(number % apart, len(garbage), apart) if fn.inputs else [0]
        for turn in turns:
            data = [garbage[(turn + place) % len(garbage)] for place in range(len(fn.inputs))]
            answer = app.event(number, data)
            found += [(fn.api_name, turn, word) for word in told(app, answer)]
            for frame in set(OURS.findall(capfd.readouterr().err)):
                found.append((fn.api_name, turn, frame))
    assert found == []
    assert beside(app) == before


def test_garbage_at_what_the_page_asks_by_itself(app: Served, garbage: list[Any]) -> None:
    for number, block in app.page.blocks.items():
        for fn in getattr(block, "server_fns", []):
            asked = {"component_id": number, "session_hash": "s", "fn_name": fn.__name__}
            for piece in garbage:
                answer = app.client.post(
                    "/gradio_api/component_server",
                    content=json.dumps(asked | {"data": piece}),
                    headers={"content-type": "application/json"},
                )
                assert told(app, answer.text) == [], (fn.__name__, piece)


def test_files_are_served_from_gradios_own_folder_alone(app: Served) -> None:
    run = app.outputs / "run"
    (app.outputs / "link.txt").symlink_to(run / "secret.txt")
    places = [
        run / "secret.txt", run / "adapter.safetensors", run / "config.yaml",
        app.outputs / "link.txt", app.outputs / ".gradio" / ".." / "run" / "secret.txt",
        app.outputs / ".gradio" / "%2e%2e" / "run" / "secret.txt", PROJECT / "app.py",
        "/etc/passwd", "../run/secret.txt", "file:///etc/passwd", "http://127.0.0.1:1/",
    ]  # fmt: skip
    for place in places:
        for route in ("file=", "file/", "proxy=", "custom_component/x/client/x/"):
            answer = app.client.get(f"/gradio_api/{route}{place}")
            assert answer.status_code in (403, 404), (route, place)
            assert SECRET not in answer.text and "root:" not in answer.text


def test_uploads_stay_in_gradios_own_folder(app: Served) -> None:
    names = ["../../evil.txt", "..\\..\\evil.txt", "/etc/evil", "CON", "x" * 400, "é😀.png", ".."]
    for name in names:
        answer = app.client.post("/gradio_api/upload", files={"files": (name, b"x")})
        if answer.status_code == 200:
            (kept,) = answer.json()
            assert Path(kept).resolve().is_relative_to(app.outputs / ".gradio")
        else:
            assert told(app, answer.text) == []
    assert all(".gradio" in file.parts for file in app.outputs.parent.rglob("*evil*"))


def test_nothing_of_a_run_came_where_it_could_be_fetched(app: Served) -> None:
    """After all of the above."""
    for file in (app.outputs / ".gradio").rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
