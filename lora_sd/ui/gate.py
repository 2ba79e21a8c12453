"""Who is let in, and to what: in front of every route of Gradio's.

Gradio serves more than this page uses, some of it without asking for its password, and refuses
neither a foreign web site's requests nor a full disk.
"""

import asyncio
import contextlib
import ipaddress
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse

from lora_sd.errors import shown_size
from lora_sd.ui.api import NAMES
from lora_sd.ui.texts import say

UPLOAD = "/gradio_api/upload"
# What the login page is made of; `startup-events` is how Gradio finds that it has started.
OPEN_TO_ALL = re.compile(
    r"/|/login/?|/(static|assets|svelte)/.*|/(theme\.css|favicon\.ico|manifest\.json)"
    r"|/gradio_api/(startup-events|login_check)/?"
)
OPEN_INSIDE = re.compile(
    r"/(logout|config)/?|/gradio_api/(info|app_id|reset|cancel|upload|upload_progress)/?"
    r"|/gradio_api/(file=.*|heartbeat/\w+|queue/(join|data)|run/predict|component_server/?)"
    rf"|/gradio_api/call/(v2/)?({'|'.join(NAMES)})(/\w+)?"
)
MOST_BODY = 8 * 2**20  # bytes of a request that is no upload: captions of thousands of pictures
MOST_CACHE = 16 * 2**30  # bytes of uploads and pictures that are kept for a day
LEFT_FREE = 2**30  # bytes of the disk that uploads leave to the runs
WRONG_PASSWORD_S = 1.0  # until the next guess is looked at
# All of the page comes from here. Gradio's scripts are partly inside the page, and write more.
HEADERS = {
    "content-security-policy": (
        "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Gate:
    """ASGI middleware that lets through what the page and the API need, and nothing else.

    A foreign site can point its own name at this machine (the Host header then tells), or post
    to it from its pages (Origin and Sec-Fetch-Site tell). An address or this machine's name is
    fine.

    Args:
        app: what comes behind.
        host: the address that is listened on.
        cache: Gradio's folder, where uploads go.
        locked: whether a password was set; Gradio's own login gives the cookie.
        ready: what posts wait for; the page itself is served before.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        cache: Path,
        locked: bool = False,
        ready: threading.Event | None = None,
    ) -> None:
        self._app = app
        self._names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), host}
        self._cache = cache
        self._locked = locked
        self._ready = ready
        self._arriving = 0  # bytes of uploads under way

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":  # there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        status, key = self._refusal(request)
        upload = 0
        if not status and scope["path"].rstrip("/") == UPLOAD:
            upload = _length(request) or 0
            status, key = await self._no_room(upload)
        if status:
            limits = {"most": shown_size(MOST_BODY), "cache": shown_size(MOST_CACHE)}
            await PlainTextResponse(say(key, **limits), status)(scope, receive, send)
            return
        while self._ready and request.method == "POST" and not self._ready.is_set():
            await asyncio.sleep(0.02)

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        self._arriving += upload
        try:
            await self._app(scope, receive, send_guarded)
        finally:
            self._arriving -= upload

    def _refusal(self, request: Request) -> tuple[int, str]:
        """(status, key of the sentence); 0 where the request is let in."""
        path, headers = request.scope["path"], request.headers
        own, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(own) or (origin and urlsplit(origin).netloc != own):
            return 403, "server.unknown_address"
        elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if elsewhere and headers.get("sec-fetch-mode") != "navigate":
            return 403, "server.unknown_address"
        if not OPEN_TO_ALL.fullmatch(path):
            if self._locked and not _logged_in(request):
                return 401, "server.log_in_first"
            if not OPEN_INSIDE.fullmatch(path):
                return 404, "server.not_here"
        if request.method == "POST":
            length = _length(request)
            if length is None:
                return 411, "server.no_length"
            if length > MOST_BODY and path.rstrip("/") != UPLOAD:
                return 413, "server.too_long"
        return 0, ""

    def _is_ours(self, host: str) -> bool:
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def _no_room(self, length: int) -> tuple[int, str]:
        """(status, key of the sentence) for an upload; 0 where there is room for it."""
        coming = self._arriving + length
        if await asyncio.to_thread(_bytes_in, self._cache) + coming > MOST_CACHE:
            return 413, "server.cache_full"
        if shutil.disk_usage(self._cache).free - coming < LEFT_FREE:
            return 507, "server.disk_full"
        return 0, ""


def password_check(password: str) -> Callable[[str, str], Awaitable[bool]]:
    """Gradio's `auth` for one password, whatever user name is given; wrong ones take their time."""
    one_at_a_time = asyncio.Lock()

    async def check(_user: str, given: str) -> bool:
        async with one_at_a_time:
            right = secrets.compare_digest(given.encode(), password.encode())
            if not right:
                await asyncio.sleep(WRONG_PASSWORD_S)
            return right

    return check


def _logged_in(request: Request) -> bool:
    """Whether the request has a cookie that Gradio's login gave."""
    app = request.app
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return any(request.cookies.get(name) in app.tokens for name in names)


def _length(request: Request) -> int | None:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() else None


def _bytes_in(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total
