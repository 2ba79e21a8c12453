"""Captioning models of random weights, and what they write beside pictures."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from make_captioners import TAGS, make_blip, make_florence, make_tagger
from PIL import Image

from lora_sd.captioning.folder import caption_folder, find_tasks
from lora_sd.captioning.opening import (
    CaptioningError,
    SentenceChoice,
    TagChoice,
    find_captioner,
)
from lora_sd.captioning.sentences import SentenceCaptioner
from lora_sd.captioning.tags import TagCaptioner, prepared, read_tags, readable
from lora_sd.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "blip": make_blip(root / "blip"),
        "florence2": make_florence(root / "florence"),
        "tags": make_tagger(root / "tagger"),
    }


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    noise = Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    return [Image.new("RGB", (20, 30), "red"), noise, Image.new("RGB", (64, 16), "blue")]


def sentences(models: dict[str, Path], kind: str, detail: str = "short", most: int = 12):
    return SentenceCaptioner(find_captioner(str(models[kind])), SentenceChoice(detail, most), CPU)


def tagger(folder: Path, **choice) -> TagCaptioner:
    return TagCaptioner(find_captioner(str(folder)), TagChoice(**choice))


@pytest.mark.parametrize("kind", ["blip", "florence2", "tags"])
def test_the_kind_is_found_by_the_files(models, kind):
    files = find_captioner(str(models[kind]))
    assert (files.kind, files.folder) == (kind, models[kind])


@pytest.mark.parametrize("kind", ["blip", "florence2"])
def test_a_sentence_depends_on_the_picture_alone(models, kind):
    captioner = sentences(models, kind)
    together = captioner.captions(pictures())
    alone = [captioner.captions([picture])[0] for picture in pictures()]
    assert together == alone and len(set(together)) > 1
    assert all(text and "[" not in text and "<" not in text for text in together)


@pytest.mark.parametrize("kind", ["blip", "florence2"])
def test_a_sentence_is_no_longer_than_asked(models, kind):
    long = sentences(models, kind, most=30).captions(pictures())
    short = sentences(models, kind, most=3).captions(pictures())
    assert max(map(len, short)) < max(map(len, long))


def test_florence_is_asked_for_the_detail(models):
    found = {
        detail: sentences(models, "florence2", detail).captions(pictures())
        for detail in ("short", "detailed", "long")
    }
    assert len({tuple(captions) for captions in found.values()}) == 3


@pytest.mark.parametrize("kind", ["blip", "florence2"])
def test_weights_that_are_not_there_are_no_captions(models, kind, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(models[kind], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptioningError, match="lacks 1 of its weights"):
        SentenceCaptioner(find_captioner(str(folder)), SentenceChoice(), CPU)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CaptioningError, match="cannot be loaded"):
        SentenceCaptioner(find_captioner(str(folder)), SentenceChoice(), CPU)


def test_models_that_cannot_be_used_are_told(models, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "auto_map": {"AutoModel": "x"}}')
    with pytest.raises(CaptioningError, match="is a model of kind 'gpt2'"):
        find_captioner(str(tmp_path))
    pickled = shutil.copytree(models["blip"], tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(CaptioningError, match="pickled weights are not read"):
        find_captioner(str(pickled))
    with pytest.raises(CaptioningError, match="the hub cannot be reached"):
        find_captioner("nobody/no-such-model")
    with pytest.raises(CaptioningError, match="is no folder, and no model of the hub"):
        find_captioner("no//such/../model")


def test_without_onnxruntime_the_sentence_names_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(CaptioningError, match="pip install -r requirements-captioning.txt"):
        tagger(models["tags"])


def test_tags_are_over_their_thresholds_characters_first(models):
    red, _, blue = tagger(models["tags"]).captions(pictures())
    assert red == "some hero, white background, ^_^" or red.startswith("some hero, ")
    assert "blue sky" in blue and "some hero" not in blue
    all_tags = tagger(models["tags"], threshold=0, character_threshold=0).captions(pictures())[0]
    assert set(all_tags.split(", ")) == {readable(n) for n, tag in TAGS.items() if tag[0] != 9}
    none = tagger(models["tags"], threshold=1, character_threshold=1).captions(pictures())
    assert none == ["", "", ""]


def test_ratings_and_excluded_tags(models):
    captioner = tagger(models["tags"], rating=True, exclude=("blue_sky", "^_^"))
    blue = captioner.captions(pictures())[2].split(", ")
    assert blue[-1] == "general" and "sensitive" not in blue
    assert "blue sky" not in blue and "^_^" not in blue


def test_a_tagger_of_one_picture_at_a_time_gives_the_same(models, tmp_path):
    one = tagger(make_tagger(tmp_path / "one", batch=1))
    assert one.captions(pictures()) == tagger(models["tags"]).captions(pictures())


def test_a_tagger_sees_blue_green_red_on_a_white_square():
    seen = prepared(Image.new("RGB", (16, 8), (10, 20, 30)), 16)
    assert seen.shape == (16, 16, 3) and seen.dtype == np.float32
    assert seen[8, 8].tolist() == [30, 20, 10]
    assert (seen[:4] == 255).all() and (seen[12:] == 255).all() and (seen[4:12] != 255).all()
    assert prepared(Image.new("RGB", (5, 9)), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("tag", "shown"),
    [("long_hair", "long hair"), ("^_^", "^_^"), ("x_x", "x_x"), ("1girl", "1girl"),
     ("|_|", "|_|"), ("(o)_(o)", "(o)_(o)"), ("k-on!", "k-on!"), ("a_cat", "a cat")],
)  # fmt: skip
def test_faces_keep_their_underscore(tag, shown):
    assert readable(tag) == shown


def test_tags_that_do_not_fit_the_model_are_told(models, tmp_path):
    folder = shutil.copytree(models["tags"], tmp_path / "tagger")
    rows = (folder / "selected_tags.csv").read_text()
    (folder / "selected_tags.csv").write_text(rows + "\n9,one_more,0,1")
    with pytest.raises(CaptioningError, match="is no WD14 tagger.*8 tags"):
        tagger(folder)
    (folder / "selected_tags.csv").write_text("name\na")
    with pytest.raises(CaptioningError, match="columns 'name' and 'category'"):
        read_tags(folder / "selected_tags.csv")
    shutil.copy(models["tags"] / "selected_tags.csv", folder)
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(CaptioningError, match=r"model.onnx' cannot be loaded"):
        tagger(folder)


class Counting:
    """A captioner that says how large a picture is."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def captions(self, pictures):
        self.batches.append(len(pictures))
        return [f"{picture.width} wide" if picture.width < 50 else "" for picture in pictures]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "inside").mkdir(parents=True)
    for number, name in enumerate(["a.png", "b.png", "c.jpg", "inside/d.webp", "e.png", "f.png"]):
        Image.new("RGB", (10 + number, 10)).save(root / name)
    Image.new("L", (10, 10)).save(root / "a-mask.png")
    (root / "b.txt").write_text("mine")
    (root / "c.caption").write_text("mine too")
    (root / "metadata.jsonl").write_text('{"file_name": "e.png", "text": "from the table"}\n')
    return root


def texts(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*.txt"))}


def run(folder: Path, captioner: Counting | None = None, dress="sks, {}".format, **options):
    return caption_folder(folder, captioner or Counting(), dress, **options)


def test_only_pictures_without_a_caption_get_one(folder):
    done = run(folder)
    assert done.had_captions == 3 and not done.left_out
    assert texts(folder) == {
        "a.txt": "sks, 10 wide\n",
        "b.txt": "mine",
        "f.txt": "sks, 15 wide\n",
        "inside/d.txt": "sks, 13 wide\n",
    }
    assert sorted(done.written) == [folder / name for name in ("a.txt", "f.txt", "inside/d.txt")]
    assert run(folder).written == [] and find_tasks(folder) == ([], 6)


def test_empty_caption_files_are_filled_and_counted_as_captions_never(folder):
    for name in ("b.txt", "c.caption", "e.txt"):  # e.png is in metadata.jsonl, but its .txt counts
        (folder / name).write_text(" \n")
    (folder / "f.txt").write_bytes(b"\xff")  # cannot be read: not ours to replace
    done = run(folder)
    assert (len(done.written), done.had_captions) == (5, 1)
    assert (folder / "b.txt").read_text() == "sks, 11 wide\n"
    assert (folder / "c.caption").read_text() == "sks, 12 wide\n" and not (
        folder / "c.txt"
    ).exists()
    assert (folder / "e.txt").read_text() == "sks, 14 wide\n"
    assert find_tasks(folder) == ([], 6)


def test_overwriting_leaves_captions_in_other_files(folder):
    done = run(folder, overwrite=True)
    assert texts(folder)["b.txt"] == "sks, 11 wide\n"
    assert not (folder / "c.txt").exists() and not (folder / "e.txt").exists()
    assert done.had_captions == 2
    (folder / "f.txt").rename(folder / "f.TXT")
    run(folder, overwrite=True, dress=str.upper)
    assert (folder / "f.TXT").read_text() == "15 WIDE\n" and not (folder / "f.txt").exists()


def test_a_stopped_run_goes_on_with_the_rest(folder):
    told = []

    def stop(done: int, of: int) -> bool:
        told.append((done, of))
        return True

    first = run(folder, batch_size=2, on_picture=stop)
    assert len(first.written) == 2 and told == [(2, 3)]
    captioner = Counting()
    assert len(run(folder, captioner, batch_size=2).written) == 1 and captioner.batches == [1]


def test_what_gets_no_caption_is_told_with_its_reason(folder):
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:40])
    Image.new("RGB", (60, 10)).save(folder / "f.png")
    done = run(folder)
    assert {picture.name: reason for picture, reason in done.left_out}.keys() == {"a.png", "f.png"}
    assert "a.txt" not in texts(folder) and "f.txt" not in texts(folder)


def test_pictures_of_one_name_share_a_caption(folder):
    Image.new("RGB", (30, 10)).save(folder / "a.jpg")
    run(folder)
    assert texts(folder)["a.txt"] == "sks, 30 wide\n"


def test_a_caption_that_came_meanwhile_stays(folder):
    class Slow(Counting):
        def captions(self, pictures):
            (folder / "a.txt").write_text("another program's")
            return super().captions(pictures)

    with pytest.raises(UserError, match="another program has put something there"):
        run(folder, Slow())
    assert texts(folder)["a.txt"] == "another program's"
