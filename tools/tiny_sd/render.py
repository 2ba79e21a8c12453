"""Icon sets to pictures: fetch the npm packages, render sprites, put them on backgrounds."""

import io
import json
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import resvg_py
import torch
from PIL import Image, ImageColor

from tools.tiny_sd.subjects import COLOURS, STYLES, SUBJECTS

SIZE_PX = 64
FIGURE_PX = 58  # the longer side of every figure; the rest is margin
RENDER_PX = 256

# The versions the shipped base was trained on.
PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/noto-v1": "1.2.5",
}


def fetch_icons(icons_dir: Path) -> None:
    """Download the icon sets from the npm registry into `icons_dir`, unless they are there.

    Leaves `icons_dir/<name>/package/icons.json`, as unpacking the packages by hand would.
    """
    for package, version in PACKAGES.items():
        target = icons_dir / package.split("/")[1] / "package"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=icons_dir) as aside:
            command = ["npm", "pack", "--silent", f"{package}@{version}"]
            packed = subprocess.run(command, cwd=aside, check=True, capture_output=True, text=True)
            with tarfile.open(Path(aside) / packed.stdout.strip().splitlines()[-1]) as tar:
                tar.extractall(aside, filter="data")
            os.rename(Path(aside) / "package", target)


def load_icons(icons_dir: Path, style: str) -> dict:
    """The icon set of one style, as iconify's `icons.json` has it."""
    name = STYLES[style][1].split("/")[1]
    return json.loads((icons_dir / name / "package" / "icons.json").read_text(encoding="utf-8"))


def icon_svg(icons: dict, name: str) -> str:
    """One icon as an SVG document; follows aliases. Raises KeyError for an unknown name."""
    if name not in icons["icons"]:
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}"><g color="#000">{icon["body"]}</g></svg>'
    )


def sprite(svg: str, size_px: int = SIZE_PX) -> Image.Image:
    """RGBA picture with the figure trimmed, centred and fitted to the same margin.

    Rendered four times as large and reduced with Lanczos, which came out crisper than rendering
    at `size_px` directly.
    """
    render_px = max(RENDER_PX, 4 * size_px)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=render_px, height=render_px)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    figure = image.crop(image.getchannel("A").getbbox())
    fit = size_px * FIGURE_PX / SIZE_PX / max(figure.size)
    figure = figure.resize([max(1, round(fit * side)) for side in figure.size], Image.LANCZOS)
    canvas = Image.new("RGBA", (size_px, size_px))
    canvas.paste(figure, [(size_px - side) // 2 for side in figure.size])
    return canvas


def render_sprites(icons_dir: Path, style: str, size_px: int = SIZE_PX) -> list[Image.Image]:
    """The sprites of all subjects in one style, in the order of SUBJECTS."""
    icons = load_icons(icons_dir, style)
    return [sprite(icon_svg(icons, name), size_px) for name in SUBJECTS.values()]


def on_background(figure: Image.Image, colour: str) -> Image.Image:
    """An RGBA sprite on a flat background of a named colour or hex value; RGB."""
    background = Image.new("RGBA", figure.size, COLOURS.get(colour, colour))
    return Image.alpha_composite(background, figure).convert("RGB")


def sprites_to_tensor(sprites: list[Image.Image]) -> torch.Tensor:
    """uint8 (n, 4, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(s) for s in sprites])).permute(0, 3, 1, 2)


def colour_tensor() -> torch.Tensor:
    """The background colours in the order of COLOURS: float (n, 3) in 0..1."""
    return torch.tensor([ImageColor.getrgb(c) for c in COLOURS.values()]) / 255


def composite(sprites: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """RGBA uint8 (n, 4, h, w) over colours float (n, 3) in 0..1; RGB float in -1..1."""
    sprites = sprites.float() / 255
    alpha = sprites[:, 3:]
    return 2 * (sprites[:, :3] * alpha + colours[:, :, None, None] * (1 - alpha)) - 1
