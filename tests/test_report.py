"""The data report: what would become of each picture, advice that is right, HTML that is safe."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.report import FORMAT, as_json, make_report
from lora_sd.data.report.base_facts import base_facts
from lora_sd.data.report.facts import Report, shown_number
from lora_sd.data.report.html import MOST_SHOWN, page, piece, shown_pictures
from lora_sd.errors import BaseModelError, ConfigError

BASE = base_facts("sd15")
HOSTILE = "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> \u202egnp & \x1b[31m"


def noise(seed: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def fill(folder: Path, pictures: dict[str, Image.Image], caption: str = "{stem}, sks") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
        text = caption.format(stem=Path(name).stem)
        (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")


@pytest.fixture
def report_of(tmp_path: Path) -> Callable[..., Report]:
    """Makes the report on pictures, or on what lies in `pictures` already."""

    def make(
        pictures: dict[str, Image.Image] | None = None, max_tokens: int = 75, **options: object
    ) -> Report:
        folder = tmp_path / "pictures"
        if pictures:
            fill(folder, pictures)
        settings = {"resolution_px": (128,)} | options
        return make_report([FolderOptions(folder, **settings)], BASE, max_tokens)  # type: ignore[arg-type]

    return make


def kinds(report: Report, name: str) -> list[str]:
    one = next(one for one in report.pictures if one.name == name)
    return [mark.kind for mark in one.marks]


def tidy(count: int = 6) -> dict[str, Image.Image]:
    return {f"{seed}.png": noise(seed) for seed in range(count)}


def test_of_tidy_pictures_only_their_word_is_said(report_of: Callable[..., Report]) -> None:
    report = report_of(tidy())
    assert report.advice == ("Every caption has 'sks': that may call the result in a prompt.",)
    assert not report.left_out and not any(one.marks for one in report.pictures)
    assert report.showings == 6 and [one.pictures for one in report.buckets] == [6]


def test_what_becomes_of_a_picture(report_of: Callable[..., Report]) -> None:
    report = report_of({"wide.png": noise(1, (400, 256))}, repeats=3.0, trigger_word="zwx")
    one = report.pictures[0]
    assert one.size_px == (400, 256) and one.views[0].crop.size_px == (128, 128)
    assert one.views[0].kept == pytest.approx(256 * 256 / (400 * 256))
    assert one.views[0].scale == pytest.approx(128 / 256)
    assert one.caption == "zwx, wide, sks" and one.caption_source == "wide.txt"
    assert one.showings == 3 and one.cut_at is None


def test_each_resolution_is_a_view(report_of: Callable[..., Report]) -> None:
    report = report_of(tidy(2), resolution_px=(64, 128))
    assert [view.crop.size_px for view in report.pictures[0].views] == [(64, 64), (128, 128)]
    assert report.showings == 4 and len(report.buckets) == 2


def test_copies_are_marked_and_one_of_each_is_kept(report_of: Callable[..., Report]) -> None:
    soft = noise(0).filter(ImageFilter.GaussianBlur(1))
    report = report_of({**tidy(), "7.png": noise(0), "8.png": soft, "9.png": soft})
    assert kinds(report, "0.png") == []
    assert kinds(report, "7.png") == ["same-file"]
    assert kinds(report, "8.png") == ["near-duplicate"]
    assert [report.pictures[n].like for n in (0, 6, 7, 8)] == [None, 0, 0, 0]
    assert "1 of 9 pictures is the same file as another: remove '7.png'." in report.advice
    assert any(said.startswith("2 of 9 pictures may be near-duplicates") for said in report.advice)


def test_small_enlarged_cropped_and_blurred_pictures_are_marked(
    report_of: Callable[..., Report],
) -> None:
    odd = {
        "small.png": noise(20, (64, 64)),
        "long.png": noise(21, (1280, 128)),
        "soft.png": noise(22).filter(ImageFilter.GaussianBlur(4)),
    }
    report = report_of({**tidy(), **odd})
    assert [kinds(report, name) for name in odd] == [["small"], ["cropped"], ["blurred"]]
    enlarged = report_of(upscale=True)
    assert kinds(enlarged, "small.png") == ["enlarged"]
    said = "\n".join(report.advice)
    assert "'small.png'" in said and "'long.png'" in said and "'soft.png'" in said


def test_what_most_pictures_have_is_told_once(report_of: Callable[..., Report]) -> None:
    report = report_of(tidy(), resolution_px=(512,))
    assert not any(one.marks for one in report.pictures)
    assert any("or a lower data.resolution_px" in said for said in report.advice)


def test_what_cannot_be_used_is_listed_with_its_reason(
    report_of: Callable[..., Report], tmp_path: Path
) -> None:
    fill(tmp_path / "pictures", {**tidy(), "dot.png": noise(9, (9, 9))})
    (tmp_path / "pictures" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "pictures" / "broken.txt").write_text("broken")
    report = report_of()
    reasons = {one.file.name: one.reason for one in report.left_out}
    assert reasons.keys() == {"broken.png", "dot.png"} and "9 x 9" in reasons["dot.png"]
    assert len(report.pictures) == 6 and report.advice[0].startswith("2 files cannot be used")


def test_a_folder_with_no_repeats_is_left_out_on_purpose(
    report_of: Callable[..., Report], tmp_path: Path
) -> None:
    fill(tmp_path / "pictures" / "0_later", {"x.png": noise(9)})
    report = report_of(tidy())
    assert len(report.left_out) == 1 and report.unusable == []
    assert not any("cannot be used" in said for said in report.advice)


def test_captions_lose_what_is_not_read(report_of: Callable[..., Report], tmp_path: Path) -> None:
    report_of(tidy())
    text = "sks " + "word " * 80
    (tmp_path / "pictures" / "0.txt").write_text(text)
    report = report_of()
    one = report.pictures[0]
    assert one.tokens == 81 and kinds(report, "0.png") == ["caption-cut"]
    assert one.caption[: one.cut_at].split() == text.split()[:75]
    assert any("set data.max_tokens to 150" in said for said in report.advice)
    assert "<del" in page(report) and report_of(max_tokens=150).pictures[0].cut_at is None


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a photo of sks cat", "All 6 pictures have the same caption"),
        ("a photo of the {stem}", "No word is in every caption"),
        ("{stem}, sks, ink", "Every caption has 'sks' and 'ink'"),
        ("a photo of zwx cat {stem}", "Every caption has 'zwx' and 'cat'"),
    ],
)
def test_advice_on_captions(
    report_of: Callable[..., Report], tmp_path: Path, caption: str, expected: str
) -> None:
    fill(tmp_path / "pictures", tidy(), caption)
    assert any(said.startswith(expected) for said in report_of().advice), report_of().advice


def test_regularisation_is_shown_as_often_as_training_and_validation_never(
    tmp_path: Path,
) -> None:
    folders = []
    for kind, count in (("training", 6), ("regularisation", 4), ("validation", 2)):
        fill(tmp_path / kind, {f"{kind}{n}.png": noise(n + 10 * count) for n in range(count)})
        folders.append(FolderOptions(tmp_path / kind, kind=kind, resolution_px=(128,)))
    report = make_report(folders, BASE)
    shown = {kind: 0.0 for kind in ("training", "regularisation", "validation")}
    for one in report.pictures:
        shown[one.kind] += one.showings
    assert shown == pytest.approx({"training": 6, "regularisation": 6, "validation": 0})
    assert sum(bucket.showings for bucket in report.buckets) == pytest.approx(report.showings)


def test_advice_is_on_what_is_learnt(tmp_path: Path) -> None:
    def soft(seed: int) -> Image.Image:
        return noise(seed).filter(ImageFilter.GaussianBlur(4))

    folders = []
    for kind, caption in (
        ("training", "a photo of sks cat {stem}"),
        ("regularisation", "a Cat"),
        ("validation", "sks cat"),
    ):
        pictures = {f"{kind}{n}.png": noise(n + 10 * len(kind)) for n in range(6)}
        if kind != "training":
            pictures |= {"soft.png": soft(len(kind)), "again.png": soft(len(kind))}
        fill(tmp_path / kind, pictures, caption)
        folders.append(FolderOptions(tmp_path / kind, kind=kind, resolution_px=(128,)))
    report = make_report(folders, BASE)
    word = "Every training caption has 'sks': that may call the result in a prompt."
    assert [said for said in report.advice if "same file" not in said] == [word]
    assert sum(mark.kind == "blurred" for one in report.pictures for mark in one.marks) == 4
    fill(tmp_path / "regularisation", {"0.png": noise(90)}, "sks, cat")
    (said,) = (said for said in make_report(folders, BASE).advice if "data.trigger_word" in said)
    assert said.startswith("No word is in every training caption and in no regularisation caption")


def test_what_is_cropped_is_marked_unless_most_pictures_are(
    report_of: Callable[..., Report],
) -> None:
    report = report_of({**tidy(), "tall.png": noise(30, (400, 1200))}, resolution_px=(256,))
    assert "cropped" in kinds(report, "tall.png")
    photos = {f"{seed}.png": noise(seed, (384, 256)) for seed in range(6)}
    squares = report_of(photos, resolution_px=(256,), max_aspect_ratio=1.0)
    assert not any(kinds(squares, name) for name in photos)
    assert any("7 of 7 pictures lose much to the crop" in said for said in squares.advice)


def test_missing_captions_and_class_pictures_are_told_with_what_to_do(
    report_of: Callable[..., Report], tmp_path: Path
) -> None:
    fill(tmp_path / "pictures", tidy())
    (tmp_path / "pictures" / "0.txt").unlink()
    report = report_of(kind="regularisation", class_pictures=7)
    assert report.advice[0].endswith("or set data.bad_pictures to skip.")
    assert report.advice[1].startswith("1 of 6 pictures in ") and "no caption" in report.advice[1]
    assert report.notices[0].startswith("2 class pictures still to be drawn into")
    assert not any("to be drawn" in said for said in report_of(class_pictures=5).notices)
    skipped = make_report([FolderOptions(tmp_path / "pictures")], BASE, bad="skip")
    assert skipped.advice[0].endswith("mend or remove it, else it is skipped.")
    assert not any("data.bad_pictures" in said for said in skipped.advice)


@pytest.mark.parametrize(
    "number, said", [(112.0, "112"), (111.56, "about 112"), (0.5, "0.5"), (1 / 3, "0.33")]
)
def test_numbers_are_as_people_say_them(number: float, said: str) -> None:
    assert shown_number(number) == said


def test_json_is_plain_and_whole(report_of: Callable[..., Report]) -> None:
    report = report_of({**tidy(), "again.png": noise(0)})
    said = json.loads(as_json(report), parse_constant=lambda name: pytest.fail(name))
    assert said["format"] == FORMAT and len(said["pictures"]) == 7
    assert said["counts"] == {"used": 7, "left_out": 0, "marked": 1, "showings_per_epoch": 7}
    again = next(one for one in said["pictures"] if one["name"] == "again.png")
    assert again["like"] == 0 and again["marks"][0]["kind"] == "same-file"
    assert again["file"] == str(report.pictures[6].file) and "thumbnail" not in again
    assert again["views"][0]["crop"]["size_px"] == [128, 128]
    assert said["captions"]["tokens"].keys() == {"fewest", "median", "most"}


class Checker(HTMLParser):
    """Gathers what a browser would make of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name in ("href", "src"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")


@pytest.mark.parametrize("draw", [page, lambda report: piece(report, 60)])
def test_hostile_names_and_captions_are_only_text(
    report_of: Callable[..., Report], draw: Callable[[Report], str]
) -> None:
    report = report_of(tidy())
    one = replace(
        report.pictures[1],
        name=HOSTILE,
        folder=Path(HOSTILE),
        caption=HOSTILE,
        caption_source=HOSTILE,
        cut_at=9,
        like=0,
        marks=tuple(replace(mark, text=HOSTILE) for mark in report.pictures[1].marks),
    )
    hostile = replace(
        report,
        folders=(Path(HOSTILE),),
        pictures=(report.pictures[0], one),
        advice=(HOSTILE,),
        notices=(HOSTILE,),
    )
    html = draw(hostile)
    found = Checker(html)
    assert not found.tags & {"script", "img", "iframe", "object", "form"}
    assert not any(name.startswith("on") for name in found.attributes)
    assert "\u202e" not in html and "\x1b" not in html and "alert(1)&lt;/script&gt;" in html


def test_the_page_is_one_file_whose_links_lead_somewhere(report_of: Callable[..., Report]) -> None:
    found = Checker(page(report_of({**tidy(), "again.png": noise(0)})))
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        assert link.startswith("data:image/jpeg;base64,") or link[1:] in found.ids, link
    assert "script" not in found.tags and "main" in found.tags


def test_tags_of_one_picture_are_counted_not_listed(
    report_of: Callable[..., Report], tmp_path: Path
) -> None:
    fill(tmp_path / "pictures", tidy(), "tag {stem}, sks, ink")
    html = page(report_of())
    assert "<td>sks</td><td>6</td>" in html and "<td>tag 1</td>" not in html
    assert "<li>6 tags of one picture alone.</li>" in html


def test_many_pictures_make_a_page_of_bounded_size(report_of: Callable[..., Report]) -> None:
    report = report_of({**tidy(), "again.png": noise(0)})
    many = replace(report, pictures=report.pictures * 600)  # 4200, of which 600 are marked
    numbers = shown_pictures(many, 300, MOST_SHOWN)
    assert set(range(300)) <= set(numbers)
    assert {n for n, one in enumerate(many.pictures) if one.marks} <= set(numbers)
    html = page(many)
    assert f"{4200 - len(numbers)} of 4200 pictures are not drawn here" in html
    everyone = replace(many, pictures=(report.pictures[-1],) * 9000)
    assert len(shown_pictures(everyone, 300, MOST_SHOWN)) == MOST_SHOWN


def test_the_piece_draws_marked_pictures_first(report_of: Callable[..., Report]) -> None:
    html = piece(report_of({**tidy(), "again.png": noise(0)}), 2)
    assert html.count("<image ") == 2 and "again.png" in html and "5 of 7 pictures" in html


def test_a_resolution_below_the_step_is_told(report_of: Callable[..., Report]) -> None:
    with pytest.raises(ConfigError, match="'data.resolution_px' is 32.*multiples of 64"):
        report_of(tidy(), resolution_px=(32,))


def test_a_base_that_is_not_there_is_told_or_guessed_by_its_name(
    report_of: Callable[..., Report], tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match="name its family: sd15, sd21, sdxl"):
        base_facts("models/cat.safetensors")
    facts = base_facts("nobody/no-xl-model")
    assert facts.step_px == 32 and "taken for sdxl" in facts.notice
    report_of(tidy())
    folder = FolderOptions(tmp_path / "pictures", resolution_px=(128,))
    assert make_report([folder], facts).notices == (facts.notice,)
