"""A folder of deliberately awkward pictures, each with what must come of it."""

import io
import json
import os
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import icc_profiles as icc
import numpy as np
from PIL import Image, ImageCms

Colour = tuple[int, ...]
SIZE = (48, 32)
RED, GREEN, BLUE, WHITE, BLACK = "#c83c28", "#28b450", "#2846c8", "#ffffff", "#000000"
OPTIONS = {"masks": "file"}  # what is expected holds for FolderOptions with these


@dataclass(frozen=True)
class Expected:
    """What must come of one picture: used as said, or left out for a `reason` holding this text.

    `colours` are those at places (x, y) of the upright picture, within `tolerance`. `notice` is
    part of what is told of it. `mask` is the mask's grey at (x, y), where it has one.
    """

    name: str
    size_px: tuple[int, int] = SIZE
    colours: dict[tuple[int, int], Colour] = field(default_factory=dict)
    tolerance: int = 1
    caption: str = ""
    source: str = ""
    repeats: float = 1.0
    mask: dict[tuple[int, int], int] = field(default_factory=dict)
    notice: str = ""
    reason: str = ""

    @property
    def is_used(self) -> bool:
        return not self.reason


def rgb(colour: str) -> Colour:
    return tuple(bytes.fromhex(colour[1:]))


def halves(left: str = RED, right: str = BLUE, size: tuple[int, int] = SIZE) -> Image.Image:
    """A picture of two colours, so that what is mirrored or turned shows."""
    image = Image.new("RGB", size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


LEFT, RIGHT = (8, 16), (40, 16)
AS_DRAWN = {LEFT: rgb(RED), RIGHT: rgb(BLUE)}


class Builder:
    """Writes pictures into the folder, and gathers what is expected of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: list[Expected] = []

    def path(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def caption(self, name: str, text: str | bytes, suffix: str = ".txt") -> None:
        data = text.encode() if isinstance(text, str) else text
        self.path(name).with_suffix(suffix).write_bytes(data)

    def add(
        self,
        name: str,
        content: Image.Image | bytes | None = None,
        *,
        captioned: bool = True,
        save: dict[str, object] | None = None,
        **expected: object,
    ) -> None:
        """One picture, with a caption of its own unless `captioned` is False."""
        path = self.path(name)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            content.save(path, **(save or {}))
        if captioned:
            stem = Path(name).stem
            self.caption(name, f"picture {stem}")
            expected = {
                "caption": f"picture {stem}",
                "source": str(Path(name).with_suffix(".txt").as_posix()),
            } | expected
        self.expected.append(Expected(name, **expected))  # type: ignore[arg-type]


def build(folder: Path) -> list[Expected]:
    """Make the folder, and say what must come of each of its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Builder(folder)
    for part in (
        formats,
        modes,
        profiles,
        orientations,
        animations,
        broken,
        other_kinds,
        names,
        captions,
        folders,
        masks,
        links,
    ):
        part(made)
    return made.expected


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(depth: int, kind: int, row: bytes, extra: bytes = b"") -> bytes:
    """A PNG of SIZE with every row the same; `kind` is its colour type."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", *SIZE, depth, kind, 0, 0, 0)
    pixels = zlib.compress((b"\0" + row) * SIZE[1])
    transparent = chunk(b"tRNS", extra) if extra else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + transparent
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def formats(made: Builder) -> None:
    made.add("plain.png", halves(), colours=AS_DRAWN)
    made.add("plain-photo.jpg", halves(), save={"quality": 95}, colours=AS_DRAWN, tolerance=3)
    made.add("progressive.jpeg", halves(), save={"progressive": True, "quality": 95},
            colours=AS_DRAWN, tolerance=3)  # fmt: skip
    made.add("plain-web.webp", halves(), save={"lossless": True}, colours=AS_DRAWN)
    made.add("plain-old.bmp", halves(), colours=AS_DRAWN)
    made.add("a-jpeg.png", encoded(halves(), "JPEG", quality=95), colours=AS_DRAWN, tolerance=3)
    made.add("a-png.jpg", encoded(halves(), "PNG"), colours=AS_DRAWN)
    made.add(
        "from-windows.jfif", encoded(halves(), "JPEG", quality=95), colours=AS_DRAWN, tolerance=3
    )
    made.add(
        "one-pixel.png", Image.new("RGB", (1, 1), RED), size_px=(1, 1), colours={(0, 0): rgb(RED)}
    )
    made.add(
        "panorama.png", halves(size=(3000, 20)), size_px=(3000, 20), colours={(1, 1): rgb(RED)}
    )


def modes(made: Builder) -> None:
    grey = Image.new("L", SIZE, 100)
    made.add("grey.png", grey, colours={LEFT: (100, 100, 100)})
    made.add("grey.jpg.jpeg", grey, colours={LEFT: (100, 100, 100)})
    made.add("one-bit.png", halves(BLACK, WHITE).convert("1"),
            colours={LEFT: rgb(BLACK), RIGHT: rgb(WHITE)})  # fmt: skip
    made.add("palette.png", halves().quantize(4), colours=AS_DRAWN)
    pale = halves().quantize(4)
    made.add("palette-see-through.png", pale,
            save={"transparency": pale.getpixel(LEFT)},
            colours={LEFT: rgb(WHITE), RIGHT: rgb(BLUE)})  # fmt: skip
    made.add("colour-see-through.png", halves(), save={"transparency": rgb(RED)},
            colours={LEFT: rgb(WHITE), RIGHT: rgb(BLUE)})  # fmt: skip
    made.add("grey-alpha.png", Image.merge("LA", [grey, Image.new("L", SIZE, 51)]),
            colours={LEFT: (224, 224, 224)})  # fmt: skip
    half = halves()
    half.putalpha(halves(BLACK, WHITE).convert("L"))
    made.add("alpha.png", half, colours={LEFT: rgb(WHITE), RIGHT: rgb(BLUE)})
    made.add("alpha.web.webp", half, save={"lossless": True},
            colours={LEFT: rgb(WHITE), RIGHT: rgb(BLUE)})  # fmt: skip
    made.add("nothing-to-see.png", Image.new("RGBA", SIZE, (200, 0, 0, 0)),
            colours={LEFT: rgb(WHITE)}, notice="wholly transparent")  # fmt: skip
    deep = struct.pack(">H", 30000)
    made.add("grey-16-bits.png", png(16, 0, deep * 48), colours={LEFT: (117, 117, 117)})
    made.add("grey-16-bits-see-through.png",
            png(16, 0, deep * 24 + struct.pack(">H", 9000) * 24, deep),
            colours={LEFT: rgb(WHITE), RIGHT: (35, 35, 35)})  # fmt: skip
    made.add("grey-2-bits-see-through.png",
            png(2, 0, b"\x55" * 6 + b"\xaa" * 6, b"\0\1"),
            colours={LEFT: rgb(WHITE), RIGHT: (170, 170, 170)})  # fmt: skip
    colour = struct.pack(">3H", 0xC811, 0x3C11, 0x2811)
    made.add("colour-16-bits.png", png(16, 2, colour * 48), colours={LEFT: rgb(RED)})
    made.add("colour-16-bits-see-through.png",
            png(16, 2, colour * 24 + struct.pack(">3H", 257, 257, 257) * 24, colour),
            colours={LEFT: rgb(WHITE), RIGHT: (1, 1, 1)})  # fmt: skip
    made.add("alpha-16-bits.png",
            png(16, 6, (colour + b"\0\0") * 24 + (colour + b"\xff\xff") * 24),
            colours={LEFT: rgb(WHITE), RIGHT: rgb(RED)})  # fmt: skip


def profiles(made: Builder) -> None:
    wide = (200, 120, 60)
    for name, primaries, gamma in (
        ("display-p3.png", icc.DISPLAY_P3, 2.2),
        ("adobe-rgb.png", icc.ADOBE_RGB, icc.ADOBE_GAMMA),
    ):
        made.add(name, Image.new("RGB", SIZE, wide),
                save={"icc_profile": icc.rgb_profile(primaries, gamma)},
                colours={LEFT: icc.rgb_in_srgb(wide, primaries, gamma)})  # fmt: skip
    made.add("grey-profile.png", Image.new("L", SIZE, 100),
            save={"icc_profile": icc.grey_profile(1.8)},
            colours={LEFT: icc.grey_in_srgb(100, 1.8)})  # fmt: skip
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made.add("srgb-profile.png", halves(), save={"icc_profile": srgb}, colours=AS_DRAWN)
    made.add("broken-profile.png", halves(), save={"icc_profile": srgb[:200]},
            colours=AS_DRAWN, notice="colour profile that does not fit")  # fmt: skip
    made.add("printers-profile-on-rgb.png", halves(),
            save={"icc_profile": icc.cmyk_profile({})}, colours=AS_DRAWN,
            notice="colour profile that does not fit")  # fmt: skip
    cyan, paper = (60.0, -40.0, -45.0), (100.0, 0.0, 0.0)
    profile = icc.cmyk_profile({(0, 0, 0, 0): paper, (1, 0, 0, 0): cyan})
    inks = Image.new("CMYK", SIZE, (0, 0, 0, 0))
    inks.paste((255, 0, 0, 0), (0, 0, 24, 32))
    made.add("cmyk.jpg", inks, save={"quality": 100},
            colours={LEFT: (0, 255, 255), RIGHT: rgb(WHITE)}, tolerance=3,
            notice="CMYK without a colour profile")  # fmt: skip
    made.add("cmyk-profile.jpg", inks, save={"quality": 100, "icc_profile": profile},
            colours={LEFT: icc.lab_in_srgb(*cyan), RIGHT: rgb(WHITE)}, tolerance=3)  # fmt: skip


TURNS = {1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270}  # fmt: skip


def orientations(made: Builder) -> None:
    upright = halves()
    upright.paste(GREEN, (0, 0, 24, 16))  # the top left: every turn and mirror image differs
    seen = {(8, 8): rgb(GREEN), (8, 24): rgb(RED), (40, 24): rgb(BLUE)}
    for number, turn in TURNS.items():
        stored = upright if turn is None else upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = number
        suffix, save = [("png", {}), ("jpg", {"quality": 95}), ("webp", {"lossless": True})][
                number % 3]  # fmt: skip
        made.add(f"turned-{number}.{suffix}", stored, save={"exif": exif, **save},
                colours=seen, tolerance=4)  # fmt: skip
    made.add("broken-exif.jpg",
            encoded(halves(), "JPEG", quality=95, exif=b"Exif\0\0II*\0garbage"),
            colours=AS_DRAWN, tolerance=3)  # fmt: skip


def animations(made: Builder) -> None:
    frames = [halves(), halves(BLACK, WHITE)]
    more = {"save_all": True, "append_images": frames[1:]}
    made.add("moving.webp", frames[0], save={**more, "lossless": True},
            colours=AS_DRAWN, notice="animated")  # fmt: skip
    made.add("moving.apng.png", frames[0], save=more, colours=AS_DRAWN, notice="animated")
    made.add(
        "phone.jpg", encoded(frames[0], "MPO", quality=95, **more), colours=AS_DRAWN, tolerance=3
    )


def broken(made: Builder) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for kind, name in (("JPEG", "cut.jpg"), ("PNG", "cut.png.png"), ("WEBP", "cut.webp")):
        whole = encoded(Image.fromarray(noise), kind)
        made.add(name, whole[: len(whole) // 2], reason="damaged or cut short")
    made.add("text.png", b"hello", reason="is not a PNG, JPEG, WEBP or BMP picture")
    made.add("empty.png", b"", reason="is an empty file")
    made.add("no-pixels.png",
            b"\x89PNG\r\n\x1a\n" + png(8, 0, b"")[8:16] + bytes(8) + png(8, 0, b"")[24:],
            reason="is damaged or cut short")  # fmt: skip
    made.add("bomb.png", encoded(Image.new("1", (9000, 9000)), "PNG"),
            reason="more than 64 million pixels")  # fmt: skip
    made.add("huge.png", b"\x89PNG", reason="is larger than 50 MB")
    os.truncate(made.path("huge.png"), 51 * 10**6)
    made.path("folder.png").mkdir()
    made.add("folder.png", reason="is a folder with a picture's name")
    if hasattr(os, "mkfifo"):
        os.mkfifo(made.path("pipe.png"))
        made.add("pipe.png", reason="is not a regular file")
    if hasattr(os, "geteuid") and os.geteuid() != 0:
        made.add("locked.png", halves(), reason="cannot be read")
        made.path("locked.png").chmod(0)


def other_kinds(made: Builder) -> None:
    made.add("moving.old.gif", encoded(halves(), "GIF"), reason="is GIF, a kind")
    made.add("scan.tif", encoded(halves(), "TIFF"), reason="is TIFF, a kind")
    made.add("drawing.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", reason="is SVG, a kind")
    made.add("iphone.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", reason="is HEIC, a kind")
    made.add("new.webp", encoded(halves(), "AVIF"), reason="is AVIF, a kind")
    made.add("gif-named.png", encoded(halves(), "GIF"), reason="is GIF, a kind")


def names(made: Builder) -> None:
    awkward = ["with  spaces & a 'quote'.png", "-rf.png", "über.png", "猫😀.png",
            "$HOME `ls`.png", "%20.png", "a.b.c.png", "Capitals.PNG"]  # fmt: skip
    if os.name != "nt":
        awkward += ['double"quote.png', "back\\slash.png", "two\nlines.png", "star*?.png"]
    for name in awkward:
        image = encoded(halves(), "PNG")
        made.add(name, image, colours=AS_DRAWN, captioned=False,
                caption="named oddly", source=name[: name.rindex(".")] + ".txt")  # fmt: skip
        made.caption(name, "named oddly")
    apart = unicodedata.normalize("NFD", "été.png")
    made.add(apart, encoded(halves(), "PNG"), captioned=False, caption="composed", source="été.txt")
    made.caption("été.png", "composed")
    if sys.platform == "linux":
        name = os.fsdecode(b"caf\xe9.png")
        made.add(name, encoded(halves(), "PNG"), captioned=False, reason="name that is no Unicode")


def captions(made: Builder) -> None:
    def one(name: str, text: str | bytes, suffix: str = ".txt", **expected: object) -> None:
        made.add(f"{name}.png", halves(), captioned=False, **({"source": name + suffix} | expected))
        made.caption(name + ".png", text, suffix)

    bear = "ein grüner Bär"
    one("caption-utf-8", bear, caption=bear)
    one("caption-with-mark", bear.encode("utf-8-sig"), caption=bear)
    one("caption-utf-16", bear.encode("utf-16"), caption=bear)
    one("caption-utf-16-big-endian", b"\xfe\xff" + bear.encode("utf-16-be"), caption=bear)
    one("caption-lines", "  a  bear,\r\n\r\n in the snow ", caption="a bear, in the snow")
    one("caption-capitals", "shouted", ".TXT", caption="shouted")
    one("caption-other-ending", "by kohya's default", ".caption", caption="by kohya's default")
    one("caption-both", "the text", caption="the text", notice="second caption")
    made.caption("caption-both.png", "something else", ".caption")
    one("caption-cp1252", bear.encode("cp1252"), reason="byte 0xfc at place 7")
    one("caption-shift-jis", "白い猫".encode("shift_jis"), reason="is not text in UTF-8")
    one("caption-utf-16-bare", bear.encode("utf-16-le"), reason="is not text in UTF-8")
    one("caption-empty", " \n", reason="is empty")
    made.add("no-caption.png", halves(), captioned=False, reason="has no caption")


def folders(made: Builder) -> None:
    made.add("3_sks cat/front.png", halves(), captioned=False, caption="sks cat",
            source="the folder's name", repeats=3)  # fmt: skip
    made.add("3_sks cat/own.png", halves(), repeats=3)
    made.add("3_sks cat/deeper/inside.png", halves(), captioned=False,
            caption="sks cat", source="the folder's name", repeats=3)  # fmt: skip
    made.add("0_later/unused.png", halves(), reason="asks for no repeats")
    made.add("1e9_/not-a-number.png", halves())
    made.add("10_/bare.png", halves(), captioned=False, reason="has no caption")
    made.add("2024_summer/beach.png", halves(), reason="more than 1000 repeats")
    made.add(".hidden/hidden.png", halves(), reason="", captioned=False)
    made.expected.pop()  # told by its folder, and neither used nor left out
    rows = [{"file_name": "listed.png", "text": "from a list"},
            {"file_name": "./deeper/listed too.png", "prompt": "from the same list"},
            {"file_name": "own.png", "caption": "not this"},
            {"file_name": "gone.png", "text": "of nothing"}]  # fmt: skip
    for name, text in (
        ("listed.png", "from a list"),
        ("deeper/listed too.png", "from the same list"),
    ):
        made.add(
            f"set/{name}", halves(), captioned=False, caption=text, source="set/metadata.jsonl"
        )
    made.add("set/own.png", halves())
    made.path("set/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made.path("set/deeper/metadata.csv").write_text(
            'file_name,text\n"in csv.png","a ""table"", too"\n')  # fmt: skip
    made.add("set/deeper/in csv.png", halves(), captioned=False,
            caption='a "table", too', source="set/deeper/metadata.csv")  # fmt: skip


def masks(made: Builder) -> None:
    left = halves(WHITE, BLACK).convert("L")
    seen = {LEFT: 255, RIGHT: 0}

    def one(
        name: str, drawn: Image.Image | bytes, ending: str = "-mask.png", **expected: object
    ) -> None:
        made.add(f"{name}.png", halves(), **expected)
        path = made.path(name + ending)
        path.write_bytes(drawn) if isinstance(drawn, bytes) else drawn.save(path)

    one("masked", left, mask=seen)
    one("masked-as-onetrainer", left.convert("RGB"), "-masklabel.png", mask=seen)
    one("masked-small", left.resize((24, 16)), mask=seen)
    one("masked-badly", left.resize((32, 32)), reason="has a mask of another shape")
    one("masked-by-nothing", b"no picture", reason="has a mask that is not a PNG")
    one("masked-in-black", Image.new("L", SIZE), reason="black all over")
    made.add("carnival-mask.png", halves(), colours=AS_DRAWN)  # of no other picture


def links(made: Builder) -> None:
    if os.name == "nt":  # wants a privilege there
        return
    link: Callable[[str, str], None] = lambda name, target: made.path(name).symlink_to(target)  # noqa: E731
    link("link-inside.png", "plain.png")
    made.add("link-inside.png", colours=AS_DRAWN)
    link("link-to-nothing.png", "nothing.png")
    made.add("link-to-nothing.png", reason="is a link to nothing")
    link("loop", ".")
    link("link-out.png", __file__)
