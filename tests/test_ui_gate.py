"""Who is let in, and to what."""

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client

from lora_sd.ui import gate
from lora_sd.ui.gate import Gate
from tests.ui_app import Served, served

PASSWORD = "a long password"


async def _app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


def ask(cache: Path, path: str = "/", method: str = "GET", **request: Any) -> httpx.Response:
    """The answer of an app behind the gate."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(Gate(_app, "127.0.0.1", cache))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


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
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "127.0.0.1:7860", "sec-fetch-site": "cross-site"}, 403),
        (
            {
                "host": "127.0.0.1:7860",
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
            },
            200,
        ),
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", gate.UPLOAD),
        ("GET", "/gradio_api/file=x"),
        ("GET", "/gradio_api/queue/data"),
        ("GET", "/"),
    ],
)
def test_other_sites_are_refused(
    headers: dict[str, str], status: int, method: str, path: str, tmp_path: Path
) -> None:
    assert ask(tmp_path, path, method, headers=headers).status_code == status


def test_websockets_are_refused(tmp_path: Path) -> None:
    said: list[Any] = []

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(Gate(_app, "127.0.0.1", tmp_path)({"type": "websocket"}, None, send))
    assert [message["type"] for message in said] == ["websocket.close"]


def test_uploads_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def upload(size: int) -> int:
        return ask(tmp_path, gate.UPLOAD, "POST", content=b"0" * size).status_code

    monkeypatch.setattr(gate, "MOST_CACHE", 1000)
    (tmp_path / "earlier").write_bytes(b"0" * 600)
    assert (upload(400), upload(401)) == (200, 413)
    monkeypatch.setattr(gate, "LEFT_FREE", 2**60)
    assert upload(10) == 507
    monkeypatch.setattr(gate, "MOST_BODY", 100)
    join = "/gradio_api/queue/join"
    assert ask(tmp_path, join, "POST", content=b"0" * 100).status_code == 200
    assert ask(tmp_path, join, "POST", content=b"0" * 101).status_code == 413

    async def endless() -> Any:
        yield b"0"

    assert ask(tmp_path, join, "POST", content=endless()).status_code == 411


def routes(router: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """(method, path) of everything that Gradio serves."""
    for route in router.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        if inner is not None:
            yield from routes(inner)
        for method in getattr(route, "methods", None) or ():
            yield method, route.path


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("locked") / "outputs", password=PASSWORD) as app:
        yield app


def filled(path: str) -> str:
    """A route's path with something in place of its {names}."""
    parts = [part.partition("}") for part in path.split("{")]
    return "".join([parts[0][0], *("train" + rest for _, _, rest in parts[1:])])


def test_without_the_password_there_is_nothing_but_the_login_page(locked: Served) -> None:
    known = set(routes(locked.page.app))
    assert ("POST", "/gradio_api/queue/join") in known and len(known) > 60
    let_in = set()
    for method, path in known:
        answer = locked.client.request(method, filled(path), follow_redirects=False)
        if answer.status_code not in (401, 404, 411):
            let_in.add((method, path.rstrip("/") or "/"))
        assert "lora_sd/" not in answer.text or path in ("/", "/theme.css")
    assert let_in == {
        ("GET", "/"), ("HEAD", "/"), ("POST", "/login"), ("GET", "/favicon.ico"),
        ("GET", "/theme.css"), ("GET", "/manifest.json"), ("GET", "/gradio_api/startup-events"),
    }  # fmt: skip


def test_with_the_password_there_is_everything(locked: Served) -> None:
    address = str(locked.client.base_url)
    wrong = httpx.post(f"{address}/login", data={"username": "a", "password": "a longer password"})
    assert wrong.status_code == 400 and wrong.elapsed.total_seconds() >= gate.WRONG_PASSWORD_S
    app = Client(address, auth=("anyone", PASSWORD), verbose=False)
    assert app.predict(api_name="/status")["training"] is None


def test_trainers_do_not_inherit_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_sd.errors import RunError
    from lora_sd.ui import server

    monkeypatch.setenv(server.PASSWORD, PASSWORD)
    assert server.read_password(None) == PASSWORD
    assert server.PASSWORD not in os.environ
    file = tmp_path / "password"
    file.write_text("from a file\n")
    assert server.read_password(file) == "from a file"
    file.write_text("short\n")
    for place in (file, tmp_path, tmp_path / "none"):
        with pytest.raises(RunError):
            server.read_password(place)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", socket.gethostname()])
def test_other_machines_are_served_only_with_a_password(host: str, tmp_path: Path) -> None:
    from lora_sd.errors import RunError
    from lora_sd.ui import server

    with pytest.raises(RunError, match="Set a password"):
        server.start(tmp_path, host, 7860)
