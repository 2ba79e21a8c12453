"""The app, served in this process for tests, and its queue spoken to as a browser does."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lora_sd.ui import server, texts

SESSION = "test"  # one for all, as each costs Gradio a copy of the page


@dataclass
class Served:
    """The app over a folder of runs: its page (Gradio's Blocks), and a client of its own."""

    page: Any
    outputs: Path
    client: httpx.Client

    def event(self, number: int, data: list[Any]) -> str:
        """All that the server answers when a page sends that event."""
        # JSON with NaN and lone surrogates, which httpx would not write
        body = json.dumps({"fn_index": number, "data": data, "session_hash": SESSION})
        kind = {"content-type": "application/json"}
        route = "queue/join" if self.page.fns[number].queue else "run/predict"
        answer = self.client.post(f"/gradio_api/{route}", content=body, headers=kind)
        if route == "run/predict" or answer.status_code != 200:
            return answer.text
        heard, where = "", {"session_hash": SESSION}
        with self.client.stream("GET", "/gradio_api/queue/data", params=where) as stream:
            for line in stream.iter_lines():
                heard += line + "\n"
                if line.startswith("data:") and json.loads(line[5:])["msg"] in (
                    "process_completed",
                    "close_stream",
                    "unexpected_error",
                ):
                    break
        return heard


@contextmanager
def served(outputs: Path, **options: Any) -> Iterator[Served]:
    """Serve on a free port until the block ends; `options` as for `server.start`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = os.environ.get("GRADIO_TEMP_DIR")
    page = server.start(outputs, "127.0.0.1", port, **{"language": texts.ENGLISH, **options})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            yield Served(page, outputs, client)
    finally:
        page.close()
        os.environ.pop("GRADIO_TEMP_DIR")
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before
