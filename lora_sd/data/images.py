"""Read one picture right: as a person sees it, in 8-bit sRGB, or say why not.

Pillow opens far more than it reads well: `verify()` passes a JPEG cut in half, 16-bit grey clips,
transparent pixels show their hidden colour, and the camera's rotation is ignored unless asked for.
"""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
OTHER_PICTURES = {
    ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".psd", ".svg", ".jp2", ".exr",
}  # fmt: skip
MOST_BYTES = 50 * 10**6
MOST_PIXELS = 64 * 10**6


class UnreadableImage(Exception):
    """Why a picture cannot be used; the text goes into a sentence after its name."""


def read_image(path: Path) -> tuple[Image.Image, str]:
    """(the picture in RGB, a notice or '').

    The camera's rotation is applied, colour profiles are converted to sRGB, transparency is laid
    on white, 16-bit grey is scaled, and of an animation the first frame is taken, with a notice.

    Raises:
        UnreadableImage: not a regular file, damaged, cut short, too large, or of a kind whose
            colours cannot be known.
    """
    if not path.is_file():
        raise UnreadableImage("is not a regular file")
    if path.stat().st_size > MOST_BYTES:
        raise UnreadableImage(f"is larger than {MOST_BYTES // 10**6} MB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MOST_PIXELS:
                    raise UnreadableImage(f"has {width} x {height} pixels; 64 million are the most")
                animated = getattr(image, "n_frames", 1) > 1
                profile = image.info.get("icc_profile")
                image.load()
                upright = ImageOps.exif_transpose(image)
        picture = _to_rgb(upright, profile)
    except UnidentifiedImageError:
        raise UnreadableImage(
            f"is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage("has more than 64 million pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise UnreadableImage(f"is damaged or cut short ({error})") from None
    return picture, "is animated: its first frame is used" if animated else ""


def _to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if image.mode.startswith("I;16"):
        scaled = (np.asarray(image, dtype=np.uint16) / 257).round().astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage("has 32-bit pixels; save it with 8 bits a channel")
    if image.mode == "P" or (image.mode in ("L", "RGB", "1") and "transparency" in image.info):
        image = image.convert("RGBA")
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA", "PA") else None
    colours = image.convert({"LA": "L", "PA": "RGB", "RGBA": "RGB"}.get(image.mode, image.mode))
    rgb = _to_srgb(colours, profile)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    return rgb


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                image, source, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # a profile that is broken or for other channels: taken as sRGB, as viewers do
    return image.convert("RGB")


def square(image: Image.Image, side_px: int) -> Image.Image:
    """The middle square of a picture, scaled so that its shorter side fills it."""
    return ImageOps.fit(image, (side_px, side_px), Image.Resampling.LANCZOS)
