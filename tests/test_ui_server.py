"""The server: who is let in, and how it begins."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from lora_sd.ui.launch import PROJECT
from lora_sd.ui.server import OwnPagesOnly


def test_the_page_is_built_without_torch() -> None:
    code = (
        "import sys, pathlib; from lora_sd.ui.page import build_page; "
        "build_page(pathlib.Path('no-such-outputs')); "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:7860"}, 200),
        ({"host": "localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "192.168.1.5"}, 200),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:7860"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:7860"}, 403),
        ({"host": ""}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://evil.example"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "http://127.0.0.1:8000"}, 403),
        ({"host": "127.0.0.1:7860", "origin": "null"}, 403),
    ],
)
def test_other_sites_are_refused(headers: dict[str, str], status: int) -> None:
    async def ask() -> int:
        transport = httpx.ASGITransport(OwnPagesOnly(_app, "127.0.0.1"))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return (await client.post("/upload", headers=headers)).status_code

    assert asyncio.run(ask()) == status


def test_a_taken_port_and_a_wrong_folder_are_sentences(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "file").touch()
        for arguments, words in (
            (["--port", port, "--outputs", str(tmp_path)], f"error: Port {port} of"),
            (["--port", "99999", "--outputs", str(tmp_path)], "error: Port 99999 of"),
            (["--outputs", str(tmp_path / "file")], "cannot be used"),
            (["--pictures", str(tmp_path / "none")], "is not a folder"),
        ):
            done = subprocess.run(
                [sys.executable, "app.py", *arguments], cwd=PROJECT, capture_output=True, text=True
            )
            assert done.returncode == 2, done.stderr
            assert words in done.stderr and "Traceback" not in done.stderr
