"""The app in a process of its own, and somebody at its page with a real browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_sd.run_folder import RunFolder, Status

PROJECT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WAIT_S = 240.0  # for what takes a second or ten where nothing else is at work
NO_BROWSER = (
    "No browser for this test. On Debian: apt-get install chromium; elsewhere: "
    "python -m playwright install chromium. Its Python side: pip install -r requirements-dev.txt"
)


@dataclass
class App:
    """The app in a process of its own, over a folder of runs."""

    outputs: Path
    port: int = 0
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        options = ["--port", str(self.port), "--outputs", str(self.outputs), "--language", "en"]
        self.process = subprocess.Popen(
            [sys.executable, "app.py", *options], cwd=PROJECT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        assert self.address in self.process.stdout.readline()

    def kill(self) -> None:
        assert self.process and self.process.stdout
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def status(self, run: str) -> Status | None:
        """What a run says of itself on the disk."""
        return RunFolder(self.outputs / run).read_status()

    def step(self, run: str) -> int:
        status = self.status(run)
        return status.step if status else 0


@dataclass
class Visitor:
    """An open page; what it did that nobody should see; how often it was pressed."""

    page: Any
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    presses: int = 0

    def field(self, name: str) -> Any:
        """What is written into, of a part of the page."""
        return self.page.locator(f"#{name}").locator("input, textarea").first

    def press(self, what: str) -> None:
        """Press a button by its id."""
        self.page.locator(f"#{what}").click()

    def unfold(self, accordion: str) -> None:
        self.page.locator(f"#{accordion} > .label-wrap").click()

    def open_tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def choose(self, dropdown: str, option: str) -> None:
        self.field(dropdown).click()
        self.page.get_by_role("option", name=option, exact=True).click()

    def wait_for_text(self, part: str, text: str) -> None:
        self.page.locator(f"#{part}").get_by_text(text).first.wait_for()

    def wait_for_value(self, name: str, value: str) -> None:
        """Wait until that stands in a field, at least at its beginning."""
        self.page.wait_for_function(
            "([name, value]) => document.querySelector("
            "`#${name} input, #${name} textarea`)?.value.startsWith(value)",
            arg=[name, value],
        )

    def wait_for_state(self, *states: str) -> None:
        """Wait until the page says that the run is in one of these states."""
        self.page.wait_for_selector(
            ",".join(f'#run-card [data-state="{state}"]' for state in states)
        )

    def step(self) -> int:
        """The run's step as the page says it."""
        return int(self.page.locator("#run-card dd").first.inner_text().split()[0])

    def saw_nothing_wrong(self) -> bool:
        return (self.errors, self.foreign) == ([], [])


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    """The app over no runs; what it trains ends with the test."""
    app = App(tmp_path / "outputs")
    app.start()
    yield app
    app.kill()
    for run in app.outputs.glob("*/status.json"):
        status = app.status(run.parent.name)
        if status and status.is_alive():
            psutil.Process(status.pid).kill()


@pytest.fixture
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing(NO_BROWSER)
    with sync_playwright() as playwright:
        found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
        if not found and not Path(playwright.chromium.executable_path).exists():
            _missing(NO_BROWSER)
        browser = playwright.chromium.launch(
            executable_path=found,
            args=[
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--no-first-run",
            ],
        )
        yield browser
        browser.close()


def visit(browser: Any, app: App, **options: Any) -> Visitor:
    """Open the page; `options` as for playwright's new_page."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
    page.set_default_timeout(1000 * WAIT_S)
    visitor = Visitor(page)

    def note(said: Any) -> None:
        if said.type == "error":
            visitor.errors.append(said.text)

    def watch(request: Any) -> None:
        if not request.url.startswith((app.address + "/", "data:", "blob:")):
            visitor.foreign.append(request.url)

    def count() -> None:
        visitor.presses += 1

    page.on("pageerror", lambda error: visitor.errors.append(str(error)))
    page.on("console", note)
    page.on("request", watch)
    page.expose_function("countPress", count)
    page.add_init_script("addEventListener('pointerdown', () => countPress(), true)")
    page.goto(app.address)
    return visitor


def until(condition: Callable[[], object]) -> None:
    """Wait for something outside of the page."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def imports_s() -> float:
    """How long this machine takes now to import the libraries that the app stands on: 9 s where two
    cores have nothing else to do. torchao is among them, which the tests want and users need not
    have."""
    began = time.monotonic()
    libraries = "import gradio; from diffusers import StableDiffusionPipeline"
    subprocess.run([sys.executable, "-c", libraries], check=True, capture_output=True)
    return time.monotonic() - began


def crowd() -> float:
    """How many programs want each core now, and at least 1: as many times longer all takes."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _missing(reason: str) -> None:
    """Skip, but not where a skipped test would go unseen."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)
