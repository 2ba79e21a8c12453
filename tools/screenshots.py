"""Draw docs/screenshots: every tab of the app, on a wide screen and on a phone, light and dark.

    python -m tools.screenshots [--outputs DIR] [FOLDER]

Two short runs are trained on the example pictures first, by the app's own API; with --outputs they
are kept there, and taken as they are the next time. Ends with an error where a page logged one.
Needs Chromium, and playwright of requirements-dev.txt.
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent
SIZES = {1440: 900, 390: 844}  # px, width to height
THEMES = ("light", "dark")
TALLEST_PX = 2400  # what is further down is cut off
RUNS = {
    "ink-icons": {"adapter.rank": 8, "adapter.alpha": 8},
    "ink-icons-rank-2": {"adapter.rank": 2, "adapter.alpha": 2},
}
OF_BOTH = {"train.steps": 120, "sample.every_steps": 30, "sample.steps": 8}
TRAINED_WITHIN_S = 1800


@contextmanager
def app_over(outputs: Path) -> Iterator[str]:
    """The address of the app over a folder of runs, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["app.py", "--port", str(port), "--outputs", str(outputs), "--language", "en"]
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def train(address: str) -> None:
    """Train the runs that are not there yet, one after the other."""
    from gradio_client import Client

    app = Client(address, verbose=False)
    there = app.predict(api_name="/status")["runs"]
    for name, settings in RUNS.items():
        if name not in there:
            app.predict("example/ink-icons", settings | OF_BOTH, name=name, api_name="/train")
    until = time.monotonic() + TRAINED_WITHIN_S
    for name in RUNS:
        while (state := app.predict(name, api_name="/status")["state"]) != "finished":
            if state in ("failed", "interrupted") or time.monotonic() > until:
                sys.exit(f"'{name}' did not finish: {state}")
            time.sleep(1)


def settled(page: Any) -> None:
    """Wait until nothing is loading and the page keeps its height."""
    height = -1
    for _ in range(40):
        page.wait_for_timeout(500)
        now = page.evaluate("document.body.scrollHeight")
        loading = page.locator(".progress-text:visible, .wrap.generating:visible").count()
        if now == height and not loading:
            return
        height = now


def draw(page: Any) -> None:
    """On the Generate tab there is a picture to be seen."""
    page.locator("#prompt textarea").fill("fox, ink drawing")
    page.locator("#generate").click()
    page.locator("#pair img").first.wait_for(timeout=120_000)


def open_tab(page: Any, number: int) -> None:
    """Press a tab; on a phone some are in a menu."""
    tab = page.get_by_role("tab").nth(number)
    tab.scroll_into_view_if_needed()
    tab.click()


def keep(page: Any, file: Path) -> None:
    """Keep what a window as high as the page shows; what sticks to its edges stays there."""
    size = dict(page.viewport_size)
    height = page.evaluate("document.body.scrollHeight")
    page.set_viewport_size({**size, "height": max(size["height"], min(height, TALLEST_PX))})
    page.wait_for_timeout(500)
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.set_viewport_size(size)
    shot.save(file, "WEBP", quality=70)


def pictures(address: str, folder: Path) -> list[str]:
    """Draw all of them into the folder; what the pages logged as errors."""
    from playwright.sync_api import sync_playwright

    errors: list[str] = []
    with sync_playwright() as playwright:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, height in SIZES.items():
            for theme in THEMES:
                page = browser.new_page(viewport={"width": width, "height": height})
                page.set_default_timeout(60_000)
                page.on("pageerror", lambda error: errors.append(str(error)))
                page.on(
                    "console",
                    lambda said: errors.append(said.text) if said.type == "error" else None,
                )
                page.goto(f"{address}/?__theme={theme}")
                page.get_by_role("tab").first.wait_for()
                names = page.get_by_role("tab").all_inner_texts()
                for number, name in enumerate(names):
                    open_tab(page, number)
                    settled(page)
                    if page.locator("#generate:visible").count():
                        draw(page)
                        settled(page)
                    stem = "-".join(name.lower().split())
                    keep(page, folder / f"{stem}-{width}-{theme}.webp")
                page.close()
        browser.close()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=PROJECT / "docs" / "screenshots")
    parser.add_argument("--outputs", type=Path, help="a folder of runs to be kept")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        outputs = options.outputs or Path(place) / "outputs"
        with app_over(outputs) as address:
            train(address)
            errors = pictures(address, options.folder)
    for error in errors:
        print(f"error on the page: {error}", file=sys.stderr)
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
