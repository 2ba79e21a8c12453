"""Read one picture right: as a person sees it, in 8-bit sRGB, or say why not.

Pillow opens far more than it reads well: `verify()` passes a JPEG cut in half, 16-bit grey clips,
transparent pixels show their hidden colour, and the camera's rotation is ignored unless asked for.
"""

import contextlib
import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp"}
OTHER_PICTURES = {
    ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".psd", ".svg", ".jp2", ".exr",
}  # fmt: skip
MOST_BYTES = 50 * 10**6
MOST_PIXELS = 64 * 10**6
# How other kinds begin, for what has a name as if it were one of ours: (offset, bytes, kind).
BEGINNINGS = [
    (0, b"GIF8", "GIF"), (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"8BPS", "Photoshop"),
    (4, b"ftypavi", "AVIF"), (4, b"ftyphe", "HEIC"), (4, b"ftypm", "HEIC"),
    (0, b"\xff\x0a", "JPEG XL"), (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000"), (0, b"v/1\x01", "OpenEXR"),
    (0, b"<svg", "SVG"), (0, b"%PDF", "PDF"),
]  # fmt: skip
WHOLLY_TRANSPARENT = "is wholly transparent: only the background shows"

OUR_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"BM")

# Of sizes, which have a limit here, and of EXIF data that is damaged and not needed.
warnings.filterwarnings("ignore", module=r"PIL\.")


class UnreadableImage(Exception):
    """Why a picture cannot be used: `reason` goes into a sentence after its name; `detail` is what
    only this picture has."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Facts:
    """What decoding a whole picture found, whatever it is to be used for.

    `size_px` is (width, height), upright. `notices` go into a sentence after its name.
    """

    size_px: tuple[int, int]
    has_alpha: bool
    notices: tuple[str, ...]


@dataclass(frozen=True)
class Decoded:
    """A picture in RGB and its alpha channel ('L') or None, both upright."""

    rgb: Image.Image
    alpha: Image.Image | None
    facts: Facts


def read_bytes(path: Path) -> bytes:
    """A picture's file.

    Raises:
        UnreadableImage: not a regular file, too large, empty, or not to be opened.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("is a folder with a picture's name")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("is not a regular file")
        if status.st_size > MOST_BYTES:
            raise UnreadableImage(f"is larger than {MOST_BYTES // 10**6} MB")
        data = path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise UnreadableImage("is a link to nothing") from None
        raise UnreadableImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if not data:
        raise UnreadableImage("is an empty file")
    return data


def examine(data: bytes) -> Facts:
    """Decode a picture without converting its colours.

    Raises:
        UnreadableImage: damaged, cut short, too large, or of a kind that is not read.
    """
    image, notices = _load(data)
    return Facts(image.size, _has_alpha(image), notices)


def decode(data: bytes, background: str = "white") -> Decoded:
    """A whole picture.

    Colour profiles are converted to sRGB, transparency is laid on the background, 16 bits are
    scaled to 8, and of an animation the first frame is taken.

    Raises:
        UnreadableImage: as `examine`.
    """
    image, notices = _load(data)
    rgb, alpha = _to_rgb(image, background)
    return Decoded(rgb, alpha, Facts(rgb.size, alpha is not None, notices))


def decode_mask(data: bytes) -> Image.Image:
    """A mask in 'L', upright; what is transparent is black.

    Raises:
        UnreadableImage: as `examine`, or black all over.
    """
    mask = decode(data, "black").rgb.convert("L")
    if mask.getextrema() == (0, 0):
        raise UnreadableImage("is black all over: nothing of its picture would count")
    return mask


def read_image(path: Path) -> Image.Image:
    """A picture in RGB on white.

    Raises:
        UnreadableImage: as `read_bytes` and `examine`.
    """
    return decode(read_bytes(path)).rgb


def _load(data: bytes) -> tuple[Image.Image, tuple[str, ...]]:
    """(the decoded picture, upright, in the colours it is stored in; notices)."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise UnreadableImage("has more than 64 million pixels", f"{width} x {height}")
        rawmode = image.tile[0].args if image.tile else None
        # A phone's JPEG (MPO) holds further pictures, such as a depth map, but does not move.
        animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        image.load()
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(_what_it_is(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage("has more than 64 million pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on a damaged file
        raise UnreadableImage("is damaged or cut short", str(error)) from None
    if image.mode in ("I", "F"):
        raise UnreadableImage("has 32-bit pixels; save it with 8 bits a channel")
    with contextlib.suppress(Exception):  # of damaged EXIF data; viewers show such a picture as is
        ImageOps.exif_transpose(image, in_place=True)
    _scale_transparency(image, rawmode)
    notices = ["is animated: its first frame is used"] if animated else []
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() == (0, 0):
        notices.append(WHOLLY_TRANSPARENT)
    if image.info.get("icc_profile"):
        if _transform(image) is None:
            notices.append("has a colour profile that does not fit it: taken as sRGB")
    elif image.mode == "CMYK":
        notices.append("is CMYK without a colour profile: its colours are a guess")
    return image, tuple(notices)


def _what_it_is(data: bytes) -> str:
    for offset, beginning, kind in BEGINNINGS:
        if data.startswith(beginning, offset):
            return f"is {kind}, a kind that is not read; save it as PNG"
    if data.startswith(OUR_BEGINNINGS):
        return "is damaged or cut short"
    return f"is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture"


def _scale_transparency(image: Image.Image, rawmode: object) -> None:
    """PNG gives its transparent colour in the file's bits; Pillow has scaled all but that."""
    transparent = image.info.get("transparency")
    if rawmode in ("L;2", "L;4") and isinstance(transparent, int):
        image.info["transparency"] = transparent * (85 if rawmode == "L;2" else 17)
    if rawmode == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def _to_rgb(image: Image.Image, background: str) -> tuple[Image.Image, Image.Image | None]:
    alpha = None
    if image.mode.startswith("I;16"):
        grey = np.asarray(image, dtype=np.uint16)
        if "transparency" in image.info:
            alpha = Image.fromarray((grey != image.info["transparency"]).astype(np.uint8) * 255)
        profile = image.info.get("icc_profile")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
        image.info["icc_profile"] = profile
    elif _has_alpha(image):
        image = image.convert("LA" if image.mode in ("1", "L", "LA") else "RGBA")
        alpha = image.getchannel("A")
    rgb = _to_srgb(image)
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    return rgb, alpha


def _to_srgb(image: Image.Image) -> Image.Image:
    colours, transform = image.convert(_colour_mode(image)), _transform(image)
    converted = ImageCms.applyTransform(colours, transform) if transform else None
    return converted or colours.convert("RGB")


def _colour_mode(image: Image.Image) -> str:
    """The mode of a picture's colours alone."""
    if image.mode in ("RGB", "L", "CMYK"):
        return image.mode
    return "L" if image.mode in ("1", "LA") or image.mode.startswith("I;16") else "RGB"


def _transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    """From the picture's colour profile to sRGB, where it is whole and for such pictures."""
    data, mode = image.info.get("icc_profile"), _colour_mode(image)
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None
