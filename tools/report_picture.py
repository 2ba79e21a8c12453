"""Draw docs/awkward_report.png: the data report on the tests' awkward folder, with some of the
example pictures before it, in a browser.

    python -m tools.report_picture [--width PX] [--dark] [FILE.png]

Needs Chromium, and playwright of requirements-dev.txt.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lora_sd.config import config_from_values
from lora_sd.data.report.html import page
from lora_sd.verbs.check_data import check

PROJECT = Path(__file__).resolve().parent.parent
LONGEST_PX = 1140


def awkward_report(folder: Path) -> str:
    """The report's HTML on the awkward folder, which is made anew, and the examples."""
    sys.path.insert(0, str(PROJECT / "tests"))
    import awkward

    awkward.build(folder)
    for number, (name, picture) in enumerate(examples().items(), start=1):
        file = folder / f"#{number} {name}.png"  # '#' puts them first
        picture.save(file)
        file.with_suffix(".txt").write_text(f"{name}, ink drawing", encoding="utf-8")
    data = {"folder": str(folder), "resolution_px": [48], **awkward.OPTIONS}
    return page(check(config_from_values({"data": data})))


def examples() -> dict[str, Image.Image]:
    """Drawings by name, some of them with something to look at."""
    names = ("butterfly", "cactus", "fox", "elephant", "pizza", "whale")
    icons = PROJECT / "assets" / "ink-icons"
    found = {name: Image.open(icons / f"{name}.png").convert("RGB") for name in names}
    butterfly, cactus, fox, elephant, pizza, whale = found.values()
    strip = Image.new("RGB", (3 * pizza.width, pizza.height))
    for place in range(3):
        strip.paste(pizza, (place * pizza.width, 0))
    return {
        "butterfly": butterfly,
        "cactus": cactus,
        "lighter cactus": ImageEnhance.Brightness(cactus).enhance(1.1),
        "soft elephant": elephant.filter(ImageFilter.GaussianBlur(5)),
        "pizzas": strip,
        "framed fox": ImageOps.expand(fox, 14, "black"),
        "whale": whale,
    }


def draw(html: Path, picture: Path, width: int, dark: bool) -> None:
    """A picture of the top of a page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
        arguments = ["--headless", "--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        theme = "dark" if dark else "light"
        view = {"width": width, "height": 900}
        tab = browser.new_page(viewport=view, color_scheme=theme)  # type: ignore[arg-type]
        tab.goto(html.as_uri())
        height = min(LONGEST_PX, tab.evaluate("document.documentElement.scrollHeight"))
        tab.set_viewport_size({"width": width, "height": height})
        tab.screenshot(path=picture)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", nargs="?", default=PROJECT / "docs" / "awkward_report.png")
    parser.add_argument("--width", type=int, default=1180)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        picture = Path(options.picture).absolute()
        os.chdir(place)  # for short names in the picture
        html = Path("report.html").absolute()
        html.write_text(awkward_report(Path("awkward")), encoding="utf-8")
        draw(html, picture, options.width, options.dark)


if __name__ == "__main__":
    main()
