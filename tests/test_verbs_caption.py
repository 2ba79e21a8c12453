"""`caption`: the verb as a function, and as a program."""

import subprocess
import sys
from pathlib import Path

import pytest
from make_captioners import make_blip, make_florence, make_tagger
from PIL import Image

from lora_sd.captioning.opening import CaptioningError
from lora_sd.errors import ConfigError, DataError
from lora_sd.verbs.caption import caption


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {
        "blip": str(make_blip(root / "blip")),
        "florence2": str(make_florence(root / "florence")),
        "tags": str(make_tagger(root / "tagger")),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    for name in ("blue", "red", "white"):
        Image.new("RGB", (20, 20), name).save(root / f"{name}.png")
    return root


@pytest.mark.parametrize("kind", ["blip", "florence2", "tags"])
def test_every_kind_captions_a_folder(folder: Path, models: dict[str, str], kind: str) -> None:
    done = caption(folder, models[kind], trigger="sks", prefix="in ink,", suffix="on paper")
    assert len(done.written) == 3
    for file in done.written:
        text = file.read_text()
        assert text.startswith("sks, in ink, ") and text.endswith(" on paper\n")


def test_options_reach_the_model(folder: Path, models: dict[str, str]) -> None:
    caption(folder, models["tags"], threshold=0.0, rating=True, exclude=("^_^",))
    everything = (folder / "white.txt").read_text().strip().split(", ")
    assert {"blue sky", "white background", "general"} <= set(everything)
    assert "^_^" not in everything
    caption(folder, models["blip"], overwrite=True, max_tokens=3)
    assert len((folder / "white.txt").read_text().split()) <= 3


def test_options_of_another_kind_of_model_are_no_wish_to_pass_over(
    folder: Path, models: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="has no option --threshold"):
        caption(folder, models["blip"], threshold=0.5, max_tokens=5)
    with pytest.raises(ConfigError, match="has no option --detail"):
        caption(folder, models["tags"], detail="long")
    assert not list(folder.glob("*.txt"))


def test_numbers_out_of_range_are_told_at_once(folder: Path) -> None:
    wrong = {"threshold": 2.0, "character_threshold": float("nan"), "max_tokens": 0}
    with pytest.raises(ConfigError) as caught:
        caption(folder, "no/model", batch_size=0, **wrong)
    assert len(caught.value.problems) == 4


def test_a_folder_with_all_captions_needs_no_model(folder: Path) -> None:
    for picture in list(folder.glob("*.png")):
        picture.with_suffix(".txt").write_text("mine")
    assert caption(folder, "no/model").had_captions == 3
    with pytest.raises(CaptioningError):
        caption(folder, "no/model", overwrite=True)
    with pytest.raises(DataError, match="does not exist"):
        caption(folder / "nowhere", "no/model")


def test_the_program_says_what_came_of_it(folder: Path, models: dict[str, str]) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lora_sd", "caption", str(folder)]
        command += ["--model", models["tags"], *more]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    (folder / "broken.png").write_bytes(b"no picture")
    ended = run("--threshold", "0", "--exclude", "blue_sky, ^_^")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("3 captions written, 0 pictures had theirs already.")
    assert "broken.png' is not a PNG" in ended.stdout and ended.stderr == ""
    written = (folder / "blue.txt").read_text()
    assert "white background" in written and "blue sky" not in written and "^_^" not in written
    ended = run("--treshold", "0.3")
    assert ended.returncode == 2 and "Did you mean '--threshold'?" in ended.stderr
    ended = run("--overwrite", "--detail", "long", "--rating")
    assert ended.returncode == 2 and ended.stderr.count("has no option") == 1
