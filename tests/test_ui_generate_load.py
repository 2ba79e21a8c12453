"""Many clients of the Generate tab at once, over HTTP."""

import io
import json
import os
import secrets
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from test_ui_generate import after, run_outputs  # noqa: F401
from ui_app import Served, served

from lora_sd import generate as generating
from lora_sd.ui.generate.handlers import GenerateHandlers
from lora_sd.ui.launch import Trainer
from lora_sd.ui.server import MOST_PAGES
from lora_sd.ui.workplace import Workplace

CLIENTS = 20
MOST_GROWTH = 100 * 2**20  # bytes


class Client:
    """Presses Generate, as pages of their own do."""

    def __init__(self, app: Served) -> None:
        self._app = app
        names = ((number, fn.fn.__name__) for number, fn in app.page.fns.items() if fn.fn)
        self._number = next(number for number, name in names if name == "press_draw")
        fn = app.page.fns[self._number]
        self._inputs, self._outputs = fn.inputs, [one.elem_id for one in fn.outputs]

    def draw(self, **values: Any) -> Image.Image | str:
        """The picture; where there is none, what the page shows instead."""
        data = [values.get(one.elem_id, getattr(one, "value", None)) for one in self._inputs]
        answer = self._event(data)
        assert answer["success"], answer
        shown = dict(zip(self._outputs, answer["output"]["data"], strict=True))
        history = shown["history"].get("value")
        if not history:
            return str(shown["generate-problems"])
        path = history[0]["image"]["path"]
        file = self._app.client.get(f"/gradio_api/file={path}")
        return Image.open(io.BytesIO(file.content))

    def _event(self, data: list[Any]) -> dict[str, Any]:
        """What the server says at the end of the event, which is a session's only one."""
        session = secrets.token_hex(6)
        body = {"fn_index": self._number, "data": data, "session_hash": session}
        joined = self._app.client.post("/gradio_api/queue/join", json=body)
        assert joined.status_code == 200, joined.text
        where = {"session_hash": session}
        with self._app.client.stream("GET", "/gradio_api/queue/data", params=where) as stream:
            for line in stream.iter_lines():
                said = json.loads(line[5:]) if line.startswith("data:") else {"msg": ""}
                if said["msg"] in ("process_completed", "unexpected_error"):
                    return said
        raise AssertionError("no answer")


@pytest.mark.parametrize("requests", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_each_client_gets_its_own_picture(
    requests: int,
    tmp_path: Path,
    run_outputs: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One at a time; one in ten fails, and hits nobody else."""
    outputs = tmp_path / "outputs"
    shutil.copytree(run_outputs, outputs)
    alone = GenerateHandlers(Workplace(outputs, None, Trainer(outputs)))
    expected = {
        seed: after(alone, seed=seed, steps=1, scale=0.5).tobytes() for seed in range(requests)
    }
    drawing, real = threading.Lock(), generating.generate

    def generate(base: Any, settings: Any, on_step: Any) -> Any:
        assert drawing.acquire(blocking=False), "two at a time"
        try:
            if settings[0].seed % 10 == 9:
                raise RuntimeError("secret")
            return real(base, settings, on_step)
        finally:
            drawing.release()

    monkeypatch.setattr(generating, "generate", generate)
    with served(outputs) as app:
        client = Client(app)
        took: dict[int, float] = {}

        def ask(seed: int) -> Image.Image | str:
            began = time.monotonic()
            got = client.draw(
                adapter="run", prompt="a fox", seed=seed, guidance=4.0, scale=0.5,
                **{"denoising-steps": 1},
            )  # fmt: skip
            took[seed] = time.monotonic() - began
            return got

        ask(0)
        before = psutil.Process(os.getpid()).memory_info().rss
        began = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = list(pool.map(ask, range(min(requests, MOST_PAGES))))
            if requests > MOST_PAGES:  # each further page takes the place of another
                before = psutil.Process(os.getpid()).memory_info().rss
                answers += pool.map(ask, range(MOST_PAGES, requests))
        whole = time.monotonic() - began
        growth = psutil.Process(os.getpid()).memory_info().rss - before
    for seed, answer in enumerate(answers):
        if seed % 10 == 9:
            assert isinstance(answer, str)
            assert "could not be drawn (RuntimeError)" in answer and "secret" not in answer
        else:
            assert isinstance(answer, Image.Image) and answer.tobytes() == expected[seed]
            assert json.loads(answer.info["lora_sd"])["seed"] == seed
    print(
        f"{requests} in {whole:.1f} s, at most {max(took.values()):.1f} s, {growth / 2**20:.0f} MB"
    )
    assert growth < MOST_GROWTH
    assert max(took.values()) < 1.5 * whole * CLIENTS / requests + 20
