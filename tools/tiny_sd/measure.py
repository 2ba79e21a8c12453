"""Reference pictures, and figures for how well generated ones match them.

Needs only `assets/reference/` (not the icon sets), so tests and demos can import it.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageColor

REFERENCE = Path(__file__).parents[2] / "assets" / "reference"
BORDER_PX = 2
DIFFERS = 0.12  # of a pixel from the background, in any of R, G, B (0..1), to count as figure


@dataclass(frozen=True)
class Reference:
    """What `assets/reference/` holds."""

    subjects: tuple[str, ...]
    example_subjects: tuple[str, ...]  # drawn in assets/ink-icons/
    held_out_subjects: tuple[str, ...]  # known to the base, not drawn there
    colours: dict[str, str]  # name -> hex
    styles: dict[str, str]  # name -> its words in a caption
    sprites: dict[str, tuple[Image.Image, ...]]  # style -> RGBA pictures, as subjects are ordered


@dataclass(frozen=True)
class Request:
    """One picture asked for."""

    subject: str
    style: str
    colour: str = "white"

    @property
    def prompt(self) -> str:
        words = load_reference().styles[self.style]
        return f"{self.subject}, {words}, {self.colour} background"


@cache
def load_reference(folder: Path = REFERENCE) -> Reference:
    """Read the sprite sheets and their index."""
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    size, columns = index["size_px"], index["columns"]
    sprites = {}
    for style in index["styles"]:
        with Image.open(folder / f"{style}.png") as sheet:
            corners = [
                (i % columns * size, i // columns * size) for i in range(len(index["subjects"]))
            ]
            sprites[style] = tuple(
                sheet.crop((x, y, x + size, y + size)).convert("RGBA") for x, y in corners
            )
    return Reference(
        subjects=tuple(index["subjects"]),
        example_subjects=tuple(index["example_subjects"]),
        held_out_subjects=tuple(index["held_out_subjects"]),
        colours=index["colours"],
        styles=index["styles"],
        sprites=sprites,
    )


def sprite(subject: str, style: str) -> Image.Image:
    """The real icon, RGBA 64x64."""
    reference = load_reference()
    return reference.sprites[style][reference.subjects.index(subject)]


def render(subject: str, style: str, colour: str = "white") -> Image.Image:
    """The real icon on a named background (or a hex value), RGB 64x64."""
    figure = sprite(subject, style)
    colours = load_reference().colours
    background = Image.new("RGBA", figure.size, colours.get(colour, colour))
    return Image.alpha_composite(background, figure).convert("RGB")


def pixels(image: Image.Image) -> np.ndarray:
    """float32 (height, width, 3) in 0..1."""
    return np.asarray(image.convert("RGB"), np.float32) / 255


@torch.no_grad()
def encode(vae: AutoencoderKL, images: list[Image.Image]) -> torch.Tensor:
    """Latent means (n, 4, h/4, w/4), in the VAE's own scale."""
    array = np.stack([pixels(image) for image in images])
    tensor = torch.from_numpy(2 * array - 1).permute(0, 3, 1, 2)
    return vae.encode(tensor.to(vae.device, vae.dtype)).latent_dist.mean.float()


def nearest_subjects(
    vae: AutoencoderKL, images: list[Image.Image], requests: list[Request]
) -> list[str]:
    """For each picture the subject whose real render, in the requested style and on the
    requested background, is nearest in the VAE's latents."""
    subjects = load_reference().subjects
    candidates: dict[tuple[str, str], torch.Tensor] = {}
    nearest = []
    for latent, request in zip(encode(vae, images), requests, strict=True):
        key = (request.style, request.colour)
        if key not in candidates:
            candidates[key] = encode(vae, [render(s, *key) for s in subjects])
        distances = (candidates[key] - latent).square().mean((1, 2, 3))
        nearest.append(subjects[int(distances.argmin())])
    return nearest


def subject_accuracy(
    vae: AutoencoderKL, images: list[Image.Image], requests: list[Request]
) -> float:
    """Share of pictures nearest to the subject that was asked for."""
    found = nearest_subjects(vae, images, requests)
    return sum(f == r.subject for f, r in zip(found, requests, strict=True)) / len(images)


def background_colour(image: Image.Image) -> str:
    """The named colour nearest to the median of the border pixels."""
    array = pixels(image)
    inside = np.zeros(array.shape[:2], bool)
    inside[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = True
    border = np.median(array[~inside], 0)

    def distance(name: str) -> float:
        named = np.array(ImageColor.getrgb(colours[name])) / 255
        return float(np.square(border - named).sum())

    colours = load_reference().colours
    return min(colours, key=distance)


def background_accuracy(images: list[Image.Image], requests: list[Request]) -> float:
    """Share of pictures on the background colour that was asked for."""
    right = [background_colour(i) == r.colour for i, r in zip(images, requests, strict=True)]
    return sum(right) / len(images)


def figure_mask(image: Image.Image, colour: str = "white") -> np.ndarray:
    """Pixels that differ from the background, bool (height, width)."""
    background = np.array(ImageColor.getrgb(load_reference().colours.get(colour, colour))) / 255
    return np.abs(pixels(image) - background).max(2) > DIFFERS


def silhouette(subject: str, style: str = "flat") -> np.ndarray:
    """The filled figure of the real icon, bool (height, width).

    For ink drawings too take the flat icon's: theirs are lines with holes between them.
    """
    return np.asarray(sprite(subject, style))[..., 3] > 127


def mean_chroma(image: Image.Image, mask: np.ndarray) -> float:
    """Mean of max - min of R, G, B (0..1) over the mask: 0 for black, white and grey.

    To compare an adapter with its base, give both pictures of a seed the mask of the base's one:
    `mean_chroma(adapted, figure_mask(base))`. NaN for an empty mask.
    """
    array = pixels(image)
    return float((array.max(2) - array.min(2))[mask].mean()) if mask.any() else float("nan")
