"""Folders of pictures: everything is used as it should be, or named with the reason."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import awkward
import pytest
import scan_speed
from PIL import Image

from lora_sd.data import scan
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import load_picture
from lora_sd.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest undoes our filter
links = pytest.mark.skipif(os.name == "nt", reason="links want a privilege there")


def picture(path, colour="white", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def read(folder, bad="fail", **options):
    return read_folders([FolderOptions(folder, **options)], bad)


def problems(*args, **options):
    with pytest.raises(DataError) as caught:
        read(*args, **options)
    return caught.value.problems


def told(found, *words):
    return [notice for notice in found.notices if all(word in notice for word in words)]


@pytest.fixture
def cats(tmp_path):
    """Three pictures, each of its own colour, with captions."""
    folder = tmp_path / "cats"
    for number, colour in enumerate(("red", "green", "blue")):
        picture(folder / f"{number}.png", colour)
        (folder / f"{number}.txt").write_text(f"a {colour} cat")
    return folder


@pytest.fixture(scope="module")
def awkward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("awkward") / "pictures"
    return folder, awkward.build(folder)


def test_every_awkward_picture_is_used_as_expected_or_left_out_with_the_reason(awkward_folder):
    folder, expected = awkward_folder
    found = read(folder, "skip", **awkward.OPTIONS)
    used = {one.name: one for one in found.pictures}
    left_out = {one.file.relative_to(folder).as_posix(): one.reason for one in found.left_out}
    wrong = [one.name for one in expected if one.name not in (used if one.is_used else left_out)]
    assert wrong == []
    assert len(used) + len(left_out) == len(expected) == len({one.name for one in expected})
    for one in expected:
        if one.is_used:
            have = used[one.name]
            assert have.file == folder / one.name
            assert have.sha256 == hashlib.sha256(have.file.read_bytes()).hexdigest()
            assert (have.size_px, have.repeats) == (one.size_px, one.repeats), one.name
            assert (have.caption, have.caption_source) == (one.caption, one.source), one.name
            shown, mask = load_picture(have)
            assert (shown.mode, shown.size) == ("RGB", one.size_px)
            for place, colour in one.colours.items():
                seen = shown.getpixel(place)
                off = max(abs(a - b) for a, b in zip(seen, colour, strict=True))
                assert off <= one.tolerance, (one.name, place, seen, colour)
            assert (mask is not None) == bool(one.mask), one.name
            assert all(mask.getpixel(place) == grey for place, grey in one.mask.items())
        else:
            assert one.reason in left_out[one.name], one.name
        if one.notice:
            assert told(found, Path(one.name).stem, one.notice), one.name


def test_failing_names_every_awkward_picture_that_cannot_be_used(awkward_folder):
    folder, expected = awkward_folder
    text = "\n".join(problems(folder, **awkward.OPTIONS))
    bad = [one for one in expected if not one.is_used and "no repeats" not in one.reason]
    hidden = sum(Path(one.name).stem not in text for one in bad)
    assert len(text.splitlines()) <= 22
    assert hidden == 0 or f"{hidden} more" in text  # told by number, as there are so many
    assert not any(f"/{one.name}'" in text for one in expected if one.is_used)


def test_the_order_is_that_of_names_not_of_the_file_system(cats, monkeypatch):
    picture(cats / "sub" / "a.png", "white")
    picture(cats / "Ä.png", "black")
    first = [one.name for one in read(cats, caption="x").pictures]
    assert first == ["0.png", "1.png", "2.png", "sub/a.png", "Ä.png"]
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(list(scandir(path))))
    assert [one.name for one in read(cats, caption="x").pictures] == first


def test_five_hundred_bad_files_are_a_few_sentences(tmp_path):
    for number in range(500):
        (tmp_path / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (tmp_path / f"{number}.txt").write_text("x")
    (tmp_path / "odd.png").write_text("hello")
    (tmp_path / "odd.txt").write_text("x")
    said = problems(tmp_path)
    assert len(said) == 2 and max(map(len, said)) < 1000 and "odd.png" in said[1]
    assert "500 files" in said[0] and "damaged" in said[0]
    with pytest.raises(DataError, match="No picture can be used"):
        read(tmp_path, "skip")


def test_all_problems_of_all_folders_are_told_at_once(cats, tmp_path):
    (cats / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (cats / "1.txt").unlink()
    (cats / "1.png").write_text("no picture, and no caption either")
    (cats / "2.txt").unlink()
    picture(tmp_path / "dogs" / "dog.png")
    (tmp_path / "dogs" / "dog.txt").write_text("")
    with pytest.raises(DataError) as caught:
        read_folders([FolderOptions(cats), FolderOptions(tmp_path / "dogs")])
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    assert all(word in text for word in ("0.png", "2.txt", "is not a PNG", "dog.txt"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda f: None, "does not exist"),
        (lambda f: f.write_text("x"), "is not a folder"),
        (lambda f: f.mkdir(), "It is empty"),
        (lambda f: f.mkdir() or (f / "a.txt").write_text("x"), "It holds 1 other"),
        (lambda f: picture(f / ".git" / "1.png"), "is hidden"),
    ],
)
def test_a_folder_without_pictures_is_said_in_one_sentence(tmp_path, make, said):
    make(tmp_path / "f")
    (problem,) = problems(tmp_path / "f")
    assert said in problem


def test_a_colour_that_is_none_is_told_once_and_a_colour_is_used(cats):
    with pytest.raises(DataError) as caught:
        read_folders([FolderOptions(cats, background="whiet")] * 2)
    (problem,) = caught.value.problems
    assert "'whiet' is no colour" in problem
    Image.new("RGBA", (8, 8)).save(cats / "0.png")
    found = read(cats, background="#102030")
    assert load_picture(found.pictures[0])[0].getpixel((0, 0)) == (16, 32, 48)


SOURCES = ["0.txt", "0.caption", "metadata.jsonl", "the setting 'caption'", "the file's name"]


def test_captions_are_looked_for_in_a_fixed_order(tmp_path):
    folder = tmp_path / "2_sks cat"
    picture(folder / "0.png")
    (folder / "0.txt").write_text("0.txt")
    (folder / "0.caption").write_text("0.caption")
    rows = {"file_name": "0.png", "text": "metadata.jsonl"}
    (folder / "metadata.jsonl").write_text(json.dumps(rows))
    options = {"caption": "the setting 'caption'", "caption_fallback": "file_name"}
    for source in SOURCES:
        (found,) = read(folder, **options).pictures
        assert found.caption_source == source
        assert found.caption == ("0" if source == "the file's name" else source)
        (folder / source).unlink(missing_ok=True)
        options = {} if source == "the file's name" else options
        if source == "the setting 'caption'":
            del options["caption"]
    (found,) = read(folder).pictures
    assert (found.caption, found.caption_source) == ("sks cat", "the folder's name")


def test_a_trigger_word_is_caption_enough(tmp_path):
    picture(tmp_path / "0.png")
    found = read(tmp_path, trigger_word="sks")
    (one,) = found.pictures
    assert (one.caption, one.caption_source) == ("", "the setting 'trigger_word'")
    assert found.notices == []  # one picture has no caption in common with others


def test_an_empty_caption_counts_where_it_is_asked_for(cats):
    (cats / "0.txt").unlink()
    (cats / "1.txt").write_text(" \n")
    picture(cats / "9.png", "white")
    (cats / "metadata.jsonl").write_text('{"file_name": "9.png", "text": ""}')
    for asked_for in (None, "a cat"):
        text = "\n".join(problems(cats, caption=asked_for))
        assert "1.png" in text and "has empty captions" in text
    found = read(cats, caption="", caption_fallback="file_name")
    sources = ["the setting 'caption'", "1.txt", "2.txt", "metadata.jsonl"]
    assert [one.caption_source for one in found.pictures] == sources
    assert [one.caption for one in found.pictures] == ["", "", "a blue cat", ""]
    (cats / "2.txt").unlink()
    assert not told(read(cats, caption=""), "same caption")


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("training", "or set data.caption, which may be empty, or data.caption_fallback."),
        ("regularisation", "or give that folder a 'caption' in data.folders, which may be empty."),
    ],
)
def test_the_advice_on_missing_captions_works(cats, kind, advice):
    (cats / "0.txt").unlink()
    (cats / "broken.png").write_text("no picture, so no caption is missed")
    said, broken = problems(cats, kind=kind)
    assert said.startswith(f"1 of 3 pictures in '{cats}' has no caption: '0.png'. Add 0.txt beside")
    assert "`python -m lora_sd caption`" in said and said.endswith(advice)
    assert "broken.png" in broken and "no caption" not in broken
    found = read(cats, "skip", kind=kind)
    assert found.without_caption == [said]
    assert not any(
        "no caption" in one.reason for one in found.left_out if "broken" in one.file.name
    )


def test_the_nearest_metadata_file_counts(tmp_path):
    for name in ("a/x.png", "a/y.png"):
        picture(tmp_path / name)
    outer = [{"file_name": f"a/{n}.png", "text": "outer"} for n in "xy"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, outer)))
    (tmp_path / "a" / "metadata.csv").write_text("file_name,text\nx.png,inner\n")
    found = read(tmp_path).pictures
    assert [(one.caption, one.caption_source) for one in found] == [
        ("inner", "a/metadata.csv"), ("outer", "metadata.jsonl"),
    ]  # fmt: skip


@pytest.mark.parametrize("names", [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9")])
def test_letters_composed_or_apart_are_the_same_name(tmp_path, names):
    picture(tmp_path / f"{names[0]}.png")
    (tmp_path / f"{names[1]}.txt").write_text("coffee")
    assert read(tmp_path).pictures[0].caption == "coffee"


def test_lines_are_kept_for_wildcards_alone(cats):
    (cats / "0.txt").write_text("one\n two  |||  three\n")
    assert read(cats).pictures[0].caption == "one two ||| three"
    assert read(cats, wildcards=True).pictures[0].caption == "one\ntwo ||| three"


@pytest.mark.parametrize(
    ("folder", "repeats", "caption"),
    [
        ("10_sks cat", 10, "sks cat"),
        ("03_a_b", 3, "a_b"),
        ("1e9_", 1, "none"),
        ("-2_cat", 1, "none"),
        ("2.5_cat", 1, "none"),
        ("cat_10", 1, "none"),
        ("_cat", 1, "none"),
        ("10_", 10, "none"),
        ("1000_cat", 1000, "cat"),
    ],
)
@pytest.mark.parametrize("inside", ["", "in/", "in/deeper/"])
def test_a_folder_s_name_gives_repeats_and_a_caption(tmp_path, folder, repeats, caption, inside):
    picture(tmp_path / folder / inside / "a.png")
    for place in (tmp_path, tmp_path / folder):
        (found,) = read(place, repeats=0.5, caption="none" if caption == "none" else None).pictures
        assert (found.repeats, found.caption) == (repeats / 2, caption)


def test_no_repeats_and_far_too_many_are_told(cats):
    picture(cats / "0_later" / "a.png")
    found = read(cats)
    assert len(found.pictures) == 3 and "no repeats" in found.left_out[0].reason
    picture(cats / "99999999999_cat" / "a.png")
    (problem,) = problems(cats)
    assert "more than 1000 repeats" in problem
    (cats / "99999999999_cat").rename(cats / "99999999999_")
    assert len(problems(cats)) == 2  # no caption either


@links
def test_hidden_folders_and_links_are_told_and_loops_end(cats, tmp_path):
    picture(cats / ".git" / "a.png")
    picture(cats / "sub" / "b.png", "white")
    (cats / "sub" / "loop").symlink_to(cats, target_is_directory=True)
    (cats / "self").symlink_to(cats / "self")
    outside = picture(tmp_path / "outside" / "c.png")
    (cats / "c.png").symlink_to(outside)
    (cats / "out").symlink_to(tmp_path / "outside", target_is_directory=True)
    (cats / "d.png").symlink_to(cats / "0.png")
    found = read(cats, caption="x")
    assert [one.name for one in found.pictures] == ["0.png", "1.png", "2.png", "d.png", "sub/b.png"]
    assert told(found, ".git", "hidden") and told(found, "c.png", "out of the folder")
    assert told(found, "loop", "not followed") and told(found, "/out'", "not followed")


def test_masks_are_no_pictures_and_are_used_where_asked_for(cats):
    Image.new("L", (4, 4), 255).save(cats / "0-mask.png")
    picture(cats / "3-mask.png", "white")  # of no other picture
    (cats / "3-mask.txt").write_text("a carnival mask")
    found = read(cats)
    assert [one.name for one in found.pictures] == ["0.png", "1.png", "2.png", "3-mask.png"]
    assert told(found, "Mask files", "1 ('0-mask.png')") and found.pictures[0].mask is None
    found = read(cats, masks="file")
    assert found.pictures[0].mask == cats / "0-mask.png"
    assert load_picture(found.pictures[0])[1].size == (8, 8)
    assert load_picture(found.pictures[1])[1] is None
    assert told(found, "have no mask", ": 3 ")


def test_a_mask_of_nearly_the_same_shape_is_scaled_and_of_another_refused(cats):
    picture(cats / "0.png", size=(1001, 667))
    picture(cats / "0-mask.png", size=(500, 333))
    assert load_picture(read(cats, masks="file").pictures[0])[1].size == (1001, 667)
    picture(cats / "0-mask.png", size=(500, 340))
    (problem,) = problems(cats, masks="file")
    assert "0-mask.png: 500 x 340, not 1001 x 667" in problem
    assert read(cats, "skip", masks="file").left_out[0].file == cats / "0.png"


def test_the_alpha_channel_is_a_mask_where_asked_for(cats):
    half = Image.new("RGBA", (8, 8), "red")
    half.paste((0, 0, 0, 0), (0, 0, 4, 8))
    half.save(cats / "0.png")
    found = read(cats, masks="alpha")
    mask = load_picture(found.pictures[0])[1]
    assert mask.getpixel((1, 1)) == 0 and mask.getpixel((6, 6)) == 255
    assert load_picture(found.pictures[1])[1] is None and told(found, "alpha channel", ": 2.")
    Image.new("RGBA", (8, 8)).save(cats / "0.png")
    assert "wholly transparent" in problems(cats, masks="alpha")[0]


def test_notices_count_what_is_odd(cats, tmp_path):
    assert read(cats).notices == []
    (cats / "9.txt").write_text("lost")
    (cats / "notes.doc").write_text("x")
    shutil.copy(cats / "0.png", cats / "2.png")
    Image.new("RGB", (8, 8)).save(cats / "1.jpg")
    (cats / "1.caption").write_text("another")
    for name in "012":
        (cats / f"{name}.txt").write_text("a cat")
    shutil.copy(cats / "1.png", cats / "4.png")
    (cats / "4.txt").write_text("a cat")
    other = picture(tmp_path / "held" / "same.png", "red")
    shutil.copy(cats / "0.png", other)
    found = read_folders(
        [
            FolderOptions(cats, repeats=2),
            FolderOptions(other.parent, kind="validation", caption="x"),
        ]
    )
    assert told(found, "belong to no picture", "1 ('9.txt')")
    assert told(found, "not looked at", "notes.doc")
    assert told(found, "share their name", "'1.jpg' and '1.png'")
    assert len(told(found, "1.caption", "second caption")) == 1
    assert told(found, "more than once", ": 2 ('0.png = 2.png = ...' and '1.png = 4.png')")
    assert told(found, "for training and for something else", ": 1 ('0.png")
    assert told(found, "All 5 training pictures have the same caption", "'a cat'")


def test_the_fingerprint_changes_with_everything_that_is_learnt(cats):
    def prints(**options):
        return read(cats, **options).fingerprint

    seen = [prints()]
    assert prints() == seen[0]
    (cats / "0.txt").write_text("a red cat!")
    seen.append(prints())
    picture(cats / "0.png", "#fe0000")
    seen += [prints(), prints(repeats=2)]
    Image.new("L", (8, 8), 255).save(cats / "0-mask.png")
    seen.append(prints(masks="file"))
    (cats / "2.png").rename(cats / "3.png")
    (cats / "2.txt").rename(cats / "3.txt")
    assert len({*seen, prints()}) == 6


def test_a_picture_that_changed_after_the_check_is_refused(cats):
    found = read(cats)
    picture(cats / "0.png", "#fe0000")
    (cats / "1.png").unlink()
    with pytest.raises(DataError, match="0.png' has changed"):
        load_picture(found.pictures[0])
    with pytest.raises(DataError, match="1.png' cannot be read"):
        load_picture(found.pictures[1])


def test_what_was_found_is_remembered_by_content(cats, tmp_path, monkeypatch):
    (cats / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("white", "black")]
    frames[0].save(cats / "4.png", save_all=True, append_images=frames[1:])
    Image.new("L", (8, 8), 255).save(cats / "0-mask.png")
    options, index = FolderOptions(cats, caption="x", masks="file"), tmp_path / "deep" / "index"

    def again():
        return read_folders([options], "skip", index=index)

    first = again()
    examine, decoded = scan.images.examine, []
    monkeypatch.setattr(
        scan.images, "examine", lambda data: decoded.append(len(data)) or examine(data)
    )
    second = again()
    assert (second.pictures, second.left_out, second.notices) == (
        first.pictures, first.left_out, first.notices,
    )  # fmt: skip
    assert decoded == []
    (cats / "0.png").rename(cats / "5.png")  # the same content under another name
    (cats / "0-mask.png").rename(cats / "5-mask.png")
    assert again().pictures[-1].name == "5.png" and decoded == []
    picture(cats / "1.png", "yellow")
    assert len(again().pictures) == 4 and len(decoded) == 1
    monkeypatch.setattr(scan, "INDEX_VERSION", "another")
    again()
    assert len(decoded) == 6


def test_a_file_may_be_a_picture_and_a_mask_of_another(cats, tmp_path):
    picture(cats / "0.png", "black")
    shutil.copy(cats / "0.png", cats / "1-mask.png")
    for _ in range(2):
        found = read_folders([FolderOptions(cats, masks="file")], "skip", index=tmp_path / "index")
        assert [one.name for one in found.pictures] == ["0.png", "2.png"]
        assert "black all over" in found.left_out[0].reason


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"\xff\xfe", b"[]", b'{"version": 1}', b"[" * 100_000,
        json.dumps({"version": scan.INDEX_VERSION, "pictures": [1, 2]}).encode(),
        None,
    ],
)  # fmt: skip
def test_a_damaged_index_is_begun_anew(cats, tmp_path, damage):
    index = tmp_path / "index"
    first = read_folders([FolderOptions(cats)], index=index)
    if damage is None:  # entries that are not what they were
        held = json.loads(index.read_bytes())
        odd = [7, {}, {"size_px": [8]}, {"problem": "x"}]
        held["pictures"] = dict(zip(held["pictures"], odd, strict=False))
        damage = json.dumps(held).encode()
    index.write_bytes(damage)
    found = read_folders([FolderOptions(cats)], index=index)
    assert found.pictures == first.pictures
    assert json.loads(index.read_bytes())["version"] == scan.INDEX_VERSION


def test_an_index_that_cannot_be_written_is_a_notice(cats, tmp_path):
    (tmp_path / "file").write_text("x")
    found = read_folders([FolderOptions(cats)], index=tmp_path / "file" / "index")
    assert len(found.pictures) == 3 and told(found, "not remembered")


def test_what_inspect_gives_comes_with_each_picture_as_training_sees_it(cats, tmp_path):
    Image.new("RGBA", (8, 8)).save(cats / "0.png")
    index = tmp_path / "index"
    for _ in range(2):
        found = read_folders(
            [FolderOptions(cats, background="blue")],
            inspect=lambda image: (image.mode, image.getpixel((0, 0))),
            index=index,
        )
        assert found.inspected[cats / "0.png"] == ("RGB", (0, 0, 255))
        assert found.inspected[cats / "1.png"] == ("RGB", (0, 128, 0))


def test_progress_is_told_and_a_stop_ends_early(cats):
    for number in range(3, 60):
        picture(cats / f"{number}.png")
    (cats / "59.png").write_text("no picture")
    calls = []

    def on_picture(done, of):
        calls.append((done, of))
        return done == 5

    found = read_folders([FolderOptions(cats, caption="x")], on_picture=on_picture)
    assert calls == [(done, 60) for done in range(1, 6)] and len(found.pictures) == 5
    calls.clear()
    with pytest.raises(DataError):
        read_folders(
            [FolderOptions(cats, caption="x")], on_picture=lambda *c: bool(calls.append(c))
        )
    assert calls[-1] == (60, 60)


def test_what_was_found_before_an_interruption_is_remembered(cats, tmp_path):
    def interrupted(done, of):
        if done == 2:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        read_folders([FolderOptions(cats)], on_picture=interrupted, index=tmp_path / "index")
    assert len(json.loads((tmp_path / "index").read_bytes())["pictures"]) >= 2


def test_only_a_few_pictures_are_in_memory_at_a_time(cats, monkeypatch):
    for number in range(3, 200):
        picture(cats / f"{number}.png")
    lock, held, most = threading.Lock(), 0, 0
    data, read_bytes = [], scan.images.read_bytes

    def counted(path):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return read_bytes(path)

    def done(done, of):
        nonlocal held
        with lock:
            held -= 1
        return False

    monkeypatch.setattr(scan.images, "read_bytes", counted)
    read_folders([FolderOptions(cats, caption="x")], on_picture=done)
    assert held == 0 and most <= 6 * min(os.cpu_count(), scan.MOST_THREADS) and data == []


def test_reading_folders_needs_no_torch():
    code = "import sys, lora_sd.data.folder, lora_sd.data.images; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory's peak from /proc")
def test_ten_thousand_pictures_are_scanned_in_minutes_and_little_memory(tmp_path):
    first, second = scan_speed.measure(tmp_path / "many", 10_000)
    assert first["pictures"] == second["pictures"] == 10_000
    # Of the processor, as others may be at work: five minutes on two cores, all they had.
    assert first["cpu_seconds"] < 600 and second["cpu_seconds"] < first["cpu_seconds"] / 4
    assert first["peak_mib"] < 1024 and not first["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="such names are a thing of Linux")
def test_a_name_that_is_no_unicode_is_named(cats):
    shutil.copy(cats / "0.png", os.fsencode(cats) + b"/caf\xe9.png")
    (problem,) = problems(cats, caption="x")
    assert "caf\\udce9.png" in problem and problem.isprintable()


def test_a_caption_that_is_no_unicode_is_not_called_missing(cats):
    (cats / "1.txt").unlink()
    with pytest.raises(DataError, match="1.png' has a caption that is no Unicode"):
        read(cats, caption="caf\udce9")
