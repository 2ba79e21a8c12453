"""Pictures and captions: read right, or named with the reason."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import PICTURE_PX
from PIL import Image, ImageCms

from lora_sd.data.cache import encode
from lora_sd.data.folder import read_folder
from lora_sd.data.images import UnreadableImage, read_image, square
from lora_sd.errors import DataError
from lora_sd.randomness import picture_at


def colour_of(path):
    return np.asarray(read_image(path)[0]).reshape(-1, 3).mean(0).round().tolist()


def test_a_folder_gives_pictures_with_their_captions(image_folder):
    found = read_folder(image_folder, PICTURE_PX)
    assert [(e.file.name, e.caption) for e in found.examples][:2] == [
        ("0.png", "a red wall"),
        ("1.png", "a green wall"),
    ]
    assert found.examples[0].picture().size == (PICTURE_PX, PICTURE_PX)
    assert found.notices == []


def test_every_problem_is_named_at_once(image_folder):
    (image_folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    (image_folder / "1.txt").unlink()
    (image_folder / "2.txt").write_bytes(b"\xff\x00\xfe caption")
    (image_folder / "3.txt").write_text(" \n")
    (image_folder / "extra.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError) as caught:
        read_folder(image_folder, PICTURE_PX)
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    assert all(name in text for name in ("0.png", "1.txt", "2.txt", "3.txt", "extra.gif"))


def test_one_caption_serves_the_images_without_their_own(image_folder):
    (image_folder / "1.txt").unlink()
    captions = [e.caption for e in read_folder(image_folder, PICTURE_PX, "a wall").examples]
    assert captions[:2] == ["a red wall", "a wall"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.write_text("x"), "is not a folder"),
        (lambda f: f.mkdir(), "It is empty"),
        (
            lambda f: (f / "cats").mkdir(parents=True) or white(f / "cats" / "1.png"),
            "name '.*cats'",
        ),
    ],
)
def test_a_folder_without_images_is_said_in_one_sentence(tmp_path, make, said):
    make(tmp_path / "f")
    with pytest.raises(DataError, match=said) as caught:
        read_folder(tmp_path / "f", PICTURE_PX)
    assert len(caught.value.problems) == 1


def white(path, **options):
    Image.new("RGB", (8, 8), "white").save(path, **options)


def test_an_ending_in_capitals_is_a_caption_too(image_folder):
    (image_folder / "0.txt").rename(image_folder / "0.TXT")
    assert read_folder(image_folder, PICTURE_PX, "a wall").examples[0].caption == "a red wall"


def test_captions_that_belong_to_no_image_are_noticed(image_folder):
    (image_folder / "9.txt").write_text("lost")
    assert "'9.txt'" in read_folder(image_folder, PICTURE_PX).notices[0]


def test_the_fingerprint_changes_with_a_caption_and_with_a_pixel(image_folder):
    first = read_folder(image_folder, PICTURE_PX).fingerprint
    assert read_folder(image_folder, PICTURE_PX).fingerprint == first
    (image_folder / "0.txt").write_text("a red wall!")
    second = read_folder(image_folder, PICTURE_PX).fingerprint
    Image.new("RGB", (PICTURE_PX, PICTURE_PX), "#fe0000").save(image_folder / "0.png")
    assert len({first, second, read_folder(image_folder, PICTURE_PX).fingerprint}) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_common_encodings_are_read(image_folder, encoding):
    (image_folder / "0.txt").write_bytes("ein  grüner\nBär".encode(encoding))
    assert read_folder(image_folder, PICTURE_PX).examples[0].caption == "ein grüner Bär"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_s_rotation_is_applied(tmp_path, orientation):
    upright = Image.new("RGB", (20, 10), "black")
    upright.paste("white", (0, 0, 5, 5))  # a mark at the top left
    turned = {
        1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4,
    }[orientation]  # fmt: skip
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    read = read_image(tmp_path / "p.png")[0]
    assert read.size == (20, 10) and read.getpixel((1, 1)) == (255, 255, 255)


def test_transparent_pixels_are_laid_on_white(tmp_path):
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "p.png")
    assert colour_of(tmp_path / "p.png") == [255, 255, 255]
    Image.new("RGBA", (8, 8), (0, 0, 0, 128)).save(tmp_path / "p.png")
    assert colour_of(tmp_path / "p.png") == [127, 127, 127]


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "p.png")
    assert colour_of(tmp_path / "p.png") == [128, 128, 128]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA"])
def test_every_mode_gives_the_colour_one_sees(tmp_path, mode):
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    assert colour_of(path) == [255, 255, 255]


def test_a_colour_profile_is_converted_to_srgb(tmp_path):
    lab = ImageCms.createProfile("LAB")
    Image.new("RGB", (8, 8), (10, 200, 30)).save(
        tmp_path / "odd.png", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes()
    )
    assert colour_of(tmp_path / "odd.png") == [10, 200, 30]  # a profile for other channels
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "p.png", icc_profile=profile)
    assert np.abs(np.array(colour_of(tmp_path / "p.png")) - [10, 200, 30]).max() <= 1


def test_the_first_frame_of_an_animation_is_used_and_said(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "p.webp", save_all=True, append_images=frames[1:], lossless=True)
    picture, notice = read_image(tmp_path / "p.webp")
    assert picture.getpixel((0, 0)) == (255, 255, 255) and "first frame" in notice


@pytest.mark.parametrize("kind", ["half", "text", "folder", "bomb"])
def test_what_cannot_be_read_says_why(tmp_path, kind):
    path = tmp_path / "p.png"
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        whole, "JPEG"
    )
    match kind:
        case "half":
            path.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        case "text":
            path.write_text("hello")
        case "folder":
            path.mkdir()
        case "bomb":
            Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(UnreadableImage):
        read_image(path)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in the file system")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.png")
    with pytest.raises(UnreadableImage, match="not a regular file"):
        read_image(tmp_path / "p.png")


def test_the_middle_square_is_cut_out():
    picture = Image.new("RGB", (30, 10), "black")
    picture.paste("white", (10, 0, 20, 10))
    assert np.asarray(square(picture, 10)).min() == 255


@pytest.mark.parametrize("pictures", [1, 5, 7])
def test_every_picture_is_seen_once_in_each_epoch(pictures):
    seen = [picture_at(position, pictures, seed=3) for position in range(4 * pictures)]
    for epoch in range(4):
        assert sorted(seen[epoch * pictures : (epoch + 1) * pictures]) == list(range(pictures))
    if pictures > 1:
        assert seen[:pictures] != seen[pictures : 2 * pictures]


def test_cached_latents_and_captions_are_what_the_models_give(base, image_folder):
    examples = read_folder(image_folder, PICTURE_PX).examples
    cache, notices = encode(base, examples, lambda done: False)
    pixels = base.pipeline().image_processor.preprocess(examples[1].picture())
    posterior = base.vae.encode(pixels).latent_dist
    torch.testing.assert_close(cache.mean[1:2], posterior.mean * base.vae.config.scaling_factor)
    tokens = base.tokenizer(
        "a green wall", padding="max_length", truncation=True, return_tensors="pt"
    )
    torch.testing.assert_close(cache.captions[1:2], base.text_encoder(tokens.input_ids)[0])
    assert cache.empty.shape == cache.captions[0].shape
    assert not torch.equal(cache.empty, cache.captions[0])


def test_captions_that_are_cut_are_told(base, image_folder):
    (image_folder / "0.txt").write_text("word " * 60)
    _, notices = encode(base, read_folder(image_folder, PICTURE_PX).examples, lambda done: False)
    assert "1 captions are longer than 14 tokens" in notices[0]
