"""Serve the page, to this machine alone unless told otherwise."""

import contextlib
import ipaddress
import os
import socket
import threading
from pathlib import Path
from typing import Any

from lora_sd.errors import RunError
from lora_sd.ui import texts
from lora_sd.ui.texts import say

MOST_UPLOAD = "400mb"  # of one file: an SD 1.5 adapter of rank 128 over all layers, with room
PASSWORD = "LORA_SD_PASSWORD"
SHORTEST_PASSWORD = 8
MOST_PAGES = 64  # whose state is kept, at more than 1 MB each; the longest unused goes first


def read_password(file: Path | None) -> str | None:
    """The password in a file, else the one in LORA_SD_PASSWORD, which programs started from here
    then do not see; None: there is none.

    Raises:
        RunError: the file cannot be read, or the password is short.
    """
    password = os.environ.pop(PASSWORD, None)
    if file is not None:
        try:
            password = file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise RunError(f"'{file}' holds no password: {reason}.") from None
    if password is not None and len(password) < SHORTEST_PASSWORD:
        raise RunError(f"A password has at least {SHORTEST_PASSWORD} characters.")
    return password


def serve(outputs: Path, host: str, port: int, **options: Any) -> None:
    """Serve until Ctrl+C; arguments and errors as of `start`."""
    page = start(outputs, host, port, **options)
    shown = f"[{host}]" if ":" in host else host
    with contextlib.suppress(KeyboardInterrupt):
        print(say("server.ready", address=f"http://{shown}:{port}/"), flush=True)
        page.block_thread()

    for sentence in left_behind(outputs):
        print(sentence, flush=True)


def left_behind(outputs: Path) -> list[str]:
    """What is to be said at the end of what goes on without the app, and what does not."""
    from lora_sd.ui.launch import Trainer
    from lora_sd.ui.queue import RunQueue

    trainer = Trainer(outputs)
    queue = RunQueue(trainer).state()
    sentences = []
    if training := trainer.current():
        sentences.append(say("server.goes_on", run=training))
    if queue.waiting() and not queue.is_held:
        sentences.append(say("server.queue_waits"))
    return sentences


def start(
    outputs: Path,
    host: str,
    port: int,
    *,
    pictures: Path | None = None,
    password: str | None = None,
    language: str | None = None,
    models: Path | None = None,
) -> Any:
    """Begin to serve; the page (Gradio's Blocks).

    Args:
        outputs: the folder of all runs.
        host, port: where to listen.
        pictures: a folder whose folders of pictures are offered for training.
        password: what visitors must know; None: nothing, on this machine alone.
        language: of the page, as 'en'; None: this system's, or English.
        models: a folder whose checkpoints are offered as base models; None: models/ beside app.py.

    Raises:
        RunError: a setting or the outputs folder cannot be used, or the port is taken.
    """
    if password is None and not _is_loopback(host):
        raise RunError(
            f"'{host}' can be reached from other machines. Set a password for that, in the "
            f"environment as {PASSWORD} or in a file named with --password-file."
        )
    for folder in (pictures, models):
        if folder and not folder.is_dir():
            raise RunError(f"'{folder}' is not a folder.")
    try:
        texts.choose(language or texts.of_system())
    except ValueError as error:
        raise RunError(f"--language: {error}.") from None
    cache = outputs.absolute() / ".gradio"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        cache.chmod(0o700)
    except OSError as error:
        raise RunError(f"'{outputs}' cannot be used: {error.strerror or error}.") from None
    _check_port(host, port)
    os.environ["GRADIO_TEMP_DIR"] = str(cache)  # not /tmp, which others can read
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "0"

    from starlette.middleware import Middleware

    from lora_sd.ui.api import keep_private
    from lora_sd.ui.gate import Gate, password_check
    from lora_sd.ui.page import build_page
    from lora_sd.ui.theme import launch_options

    page = build_page(outputs, pictures, models)
    keep_private(page)
    page.queue(api_open=False, default_concurrency_limit=1, max_size=32)
    ready = threading.Event()
    gate = Middleware(Gate, host=host, cache=cache, locked=password is not None, ready=ready)
    page.launch(
        server_name=host,
        server_port=port,
        auth=password_check(password) if password is not None else None,
        auth_message=say("server.password"),
        max_file_size=MOST_UPLOAD,
        state_session_capacity=MOST_PAGES,
        allowed_paths=[],
        share=False,
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        quiet=True,
        inbrowser=False,
        footer_links=[],
        prevent_thread_lock=True,
        _frontend=False,  # nor look at the page before anybody else: a slow machine fails that
        app_kwargs={"middleware": [gate]},
        **launch_options(),
    )
    threading.Thread(target=_import_the_rest, args=(ready,)).start()
    return page


def _import_the_rest(ready: threading.Event) -> None:
    """What no handler may be the first to import: transformers puts another module in its own
    place, and a thread that imports it meanwhile fails."""
    try:
        import transformers  # noqa: F401
    finally:
        ready.set()


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


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
