"""Serve the page, to this machine alone unless told otherwise."""

import contextlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lora_sd.errors import RunError

MOST_UPLOAD = "400mb"  # of one file: an SD 1.5 adapter of rank 128 over all layers, with room


def serve(host: str, port: int, outputs: Path, more_pictures: Path | None = None) -> None:
    """Serve until Ctrl+C.

    Raises:
        RunError: the outputs folder cannot be used, or the port is taken.
    """
    if more_pictures and not more_pictures.is_dir():
        raise RunError(f"'{more_pictures}' is not a folder.")
    cache = outputs.absolute() / ".gradio"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        cache.chmod(0o700)
    except OSError as error:
        raise RunError(f"'{outputs}' cannot be used: {error.strerror or error}.") from None
    _check_port(host, port)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # not /tmp, which others can read
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"

    # It puts another module in its own place: a thread that imports it meanwhile fails.
    import transformers  # noqa: F401
    from starlette.middleware import Middleware

    from lora_sd.ui.launch import Trainer
    from lora_sd.ui.page import build_page
    from lora_sd.ui.theme import launch_options

    page = build_page(outputs, more_pictures)
    page.queue(api_open=False, default_concurrency_limit=1, max_size=32)
    shown = f"[{host}]" if ":" in host else host
    page.launch(
        server_name=host,
        server_port=port,
        max_file_size=MOST_UPLOAD,
        allowed_paths=[],
        share=False,
        enable_monitoring=False,
        ssr_mode=False,
        quiet=True,
        inbrowser=False,
        footer_links=[],
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(OwnPagesOnly, host=host)]},
        **launch_options(),
    )
    with contextlib.suppress(KeyboardInterrupt):
        print(f"lora_sd is at http://{shown}:{port}/ (Ctrl+C ends it)", flush=True)
        page.block_thread()
    if training := Trainer(outputs).current():
        print(f"The training of '{training}' goes on. Start the app again to see it.", flush=True)


class OwnPagesOnly:
    """Refuse requests that another web site makes a visitor's browser send.

    A foreign site can point its own name at this machine (the Host header then tells), or post
    to it from its pages (the Origin header tells). An address or this machine's name is fine.
    """

    def __init__(self, app: Any, host: str) -> None:
        self._app = app
        self._names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower(), host}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {
                key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
            }
            own = headers.get("host", "")
            origin = headers.get("origin")
            if not self._is_ours(own) or (origin and urlsplit(origin).netloc != own):
                await _refuse(send)
                return
        await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name = (urlsplit(f"//{host}").hostname or "").lower()
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def _refuse(send: Any) -> None:
    text = b"This address is not known to the app: open it as localhost or by its IP address."
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def _check_port(host: str, port: int) -> None:
    """Gradio would say it in a traceback."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name != "nt":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RunError(
                f"Port {port} of '{host}' cannot be used: {reason}. Choose another with --port."
            ) from None
