"""One picture: read as a person sees it, or named with the reason."""

import io
import os
import struct
import subprocess
import sys
import warnings

import icc_profiles as icc
import numpy as np
import pytest
from PIL import Image, ImageCms

from lora_sd.data import images
from lora_sd.data.images import UnreadableImage, read_image

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one_colour(data, background="white"):
    colours = images.decode(data, background).rgb.getcolors()
    assert len(colours) == 1
    return colours[0][1]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_rotation_is_applied_and_the_size_is_the_upright_one(kind, orientation):
    upright = Image.new("RGB", (32, 16), "black")
    upright.paste("white", (0, 0, 8, 8))  # a mark at the top left
    turned = {
        1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4,
    }[orientation]  # fmt: skip
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, quality=95)
    read = images.decode(data)
    assert read.rgb.size == images.examine(data).size_px == read.facts.size_px == (32, 16)
    assert min(read.rgb.getpixel((2, 2))) > 240 and max(read.rgb.getpixel((28, 12))) < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0II*\0garbage", b"nothing of the sort", b""])
def test_damaged_exif_data_leaves_a_picture_as_it_is(exif):
    assert one_colour(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif)) == (0, 0, 0)


def test_pillow_s_warnings_of_damaged_exif_data_are_not_shown(tmp_path):
    exif = b"Exif\0\0II*\0garbage"
    (tmp_path / "p.jpg").write_bytes(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    code = (
        "import sys; from lora_sd.data import images; images.decode(open(sys.argv[1], 'rb').read())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p.jpg")], capture_output=True, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize(("background", "seen"), [("white", 255), ("black", 0), ("#404040", 64)])
def test_transparent_pixels_are_laid_on_the_background(background, seen):
    assert one_colour(encoded(Image.new("RGBA", (8, 8), (200, 0, 0, 0)), "PNG"), background) == (
        seen, seen, seen,
    )  # fmt: skip
    half = one_colour(encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"), background)
    assert half == (round(seen * 127 / 255),) * 3


def test_the_alpha_channel_comes_upright_with_the_picture():
    image = Image.new("RGBA", (32, 16), (9, 9, 9, 0))
    image.paste((9, 9, 9, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = image.transpose(Image.Transpose.ROTATE_90)
    alpha = images.decode(encoded(turned, "PNG", exif=exif)).alpha
    assert alpha.size == (32, 16) and alpha.getpixel((2, 2)) == 255 and not alpha.getpixel((28, 12))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "PA"])
def test_every_mode_gives_the_colour_one_sees(mode):
    image = Image.new("RGB", (8, 8), "white").convert("LA" if mode == "PA" else mode).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert one_colour(encoded(image.convert("P") if mode == "PA" else image, kind)) == (255,) * 3


@pytest.mark.parametrize("value", [0, 128, 257, 32768, 65535])
def test_16_bit_grey_is_scaled_not_clipped(value):
    grey = Image.fromarray(np.full((8, 8), value, np.uint16))
    assert one_colour(encoded(grey, "PNG")) == (round(value / 257),) * 3


def test_32_bit_pixels_are_refused_whatever_lets_them_in(monkeypatch):
    monkeypatch.setattr(images, "FORMATS", ("TIFF",))
    with pytest.raises(UnreadableImage, match="32-bit"):
        images.examine(encoded(Image.new("F", (8, 8)), "TIFF"))


COLOURS = [(200, 120, 60), (30, 200, 90), (0, 0, 0), (255, 255, 255), (17, 34, 240)]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize(
    ("primaries", "gamma"), [(icc.DISPLAY_P3, 2.2), (icc.ADOBE_RGB, icc.ADOBE_GAMMA)]
)
def test_wide_colours_become_srgb(colour, primaries, gamma):
    profile = icc.rgb_profile(primaries, gamma)
    for mode in ("RGB", "RGBA"):
        data = encoded(Image.new("RGB", (8, 8), colour).convert(mode), "PNG", icc_profile=profile)
        seen = np.array(one_colour(data))
        assert np.abs(seen - icc.rgb_in_srgb(colour, primaries, gamma)).max() <= 1
        reference = ImageCms.profileToProfile(
            Image.new("RGB", (1, 1), colour),
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
        )
        assert np.abs(seen - reference.getpixel((0, 0))).max() <= 1


@pytest.mark.parametrize("grey", [0, 20, 100, 200, 255])
def test_grey_with_a_profile_becomes_srgb(grey):
    image = Image.new("L", (8, 8), grey)
    data = encoded(image, "PNG", icc_profile=icc.grey_profile(1.8))
    assert np.abs(np.subtract(one_colour(data), icc.grey_in_srgb(grey, 1.8))).max() <= 1


def test_a_printer_s_inks_are_what_its_profile_says():
    corners = {(0, 0, 0, 0): (100.0, 0.0, 0.0), (0, 1, 1, 0): (45.0, 60.0, 45.0)}
    for inks, lab in corners.items():
        image = Image.new("CMYK", (8, 8), tuple(255 * ink for ink in inks))
        data = encoded(image, "JPEG", quality=100, icc_profile=icc.cmyk_profile(corners))
        assert np.abs(np.subtract(one_colour(data), icc.lab_in_srgb(*lab))).max() <= 3
        assert images.examine(data).notices == ()


def test_a_profile_that_does_not_fit_is_told_and_taken_as_srgb():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (lab, srgb[:200], b"nothing", icc.cmyk_profile({}), icc.grey_profile(1.8)):
        data = encoded(Image.new("RGB", (8, 8), (10, 200, 30)), "PNG", icc_profile=profile)
        assert one_colour(data) == (10, 200, 30)
        assert "does not fit" in images.examine(data).notices[0]


def test_the_first_frame_of_an_animation_is_used_and_said(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    for name in ("p.webp", "p.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        read = images.decode((tmp_path / name).read_bytes())
        assert read.rgb.getpixel((0, 0)) == (255, 255, 255)
        assert "first frame" in read.facts.notices[0]


def test_a_phone_s_jpeg_with_further_pictures_inside_is_no_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert one_colour(data) == (255, 255, 255) and images.examine(data).notices == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_picture_cut_anywhere_is_never_read_as_if_it_were_whole(kind):
    whole = encoded(NOISE, kind)
    for share in (0.02, 0.3, 0.6, 0.9, 0.99):
        with pytest.raises(UnreadableImage, match="damaged or cut short|is not a"):
            images.examine(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(kind):
    random, whole = np.random.default_rng(1), encoded(NOISE, kind)
    for _ in range(60):
        data = bytearray(whole)
        for place in random.integers(0, min(len(data), 400), 3):
            data[place] = random.integers(0, 256)
        try:
            assert images.decode(bytes(data)).rgb.mode == "RGB"
        except UnreadableImage as error:
            assert error.reason


@pytest.mark.parametrize("raised", [IndexError, struct.error, TypeError, ZeroDivisionError])
def test_whatever_a_decoder_raises_is_a_damaged_picture(monkeypatch, raised):
    def fails(*_, **__):
        raise raised("odd")

    monkeypatch.setattr(Image, "open", fails)
    with pytest.raises(UnreadableImage, match="damaged or cut short .odd"):
        images.examine(b"\x89PNG\r\n")


@pytest.mark.parametrize(
    ("kind", "name"),
    [("GIF", "GIF"), ("TIFF", "TIFF"), ("AVIF", "AVIF"), ("JPEG2000", "JPEG 2000")],
)
def test_other_kinds_are_called_by_their_names(kind, name):
    with pytest.raises(UnreadableImage, match=f"is {name}, a kind that is not read"):
        images.examine(encoded(NOISE, kind))


def test_a_picture_of_too_many_pixels_is_not_decoded():
    data = encoded(Image.new("1", (9000, 9000)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match="64 million"):
            images.examine(data)


@pytest.mark.parametrize("kind", ["text", "folder", "empty", "large", "missing"])
def test_what_cannot_be_read_says_why(tmp_path, kind):
    path, said = tmp_path / "p.png", ""
    match kind:
        case "text":
            path.write_text("hello")
            said = "is not a PNG"
        case "folder":
            path.mkdir()
            said = "is a folder"
        case "empty":
            path.touch()
            said = "is an empty file"
        case "large":
            path.touch()
            os.truncate(path, images.MOST_BYTES + 1)
            said = "larger than 50 MB"
        case "missing":
            said = "cannot be read: no such file"
    with pytest.raises(UnreadableImage, match=said):
        read_image(path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in the file system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read_image(tmp_path / "p.png")
