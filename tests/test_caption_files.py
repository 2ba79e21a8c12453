"""Captions in files: every encoding is read or named, metadata files are told line by line."""

import json

import pytest

from lora_sd.data.caption_files import (
    UnreadableCaption,
    path_key,
    read_metadata,
    read_own,
)  # fmt: skip

BEAR = "ein grüner Bär, 白い猫 😀"


def write(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_is_read_in_every_form_that_says_what_it_is(tmp_path, encoding):
    assert read_own(write(tmp_path / "c.txt", BEAR.encode(encoding))) == BEAR
    big_endian = b"\xfe\xff" + BEAR.encode("utf-16-be")
    assert read_own(write(tmp_path / "c.txt", big_endian)) == BEAR


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("grün".encode("cp1252"), "0xfc at place 3"),
        ("白い猫".encode("shift_jis"), "0x94 at place 1"),
        ("白猫".encode("gb18030"), "0xb0 at place 1"),
        ("bear".encode("utf-16-le"), "as UTF-16 does"),
        ("bear".encode("utf-32"), "zero characters"),
        (b"\xff\xfea", "0x61"),  # UTF-16 cut short
        (b"a\0b", "zero bytes"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n\t", "is empty"),
        (b"x" * (10**6 + 1), "larger than 1 MB"),
    ],
)
def test_what_is_no_caption_says_why(tmp_path, content, said):
    file = write(tmp_path / "c.txt", content)
    with pytest.raises(UnreadableCaption) as caught:
        read_own(file)
    assert said in str(caught.value.of(file)) and "c.txt" in str(caught.value.of(file))


def test_lines_are_kept_only_where_they_are_asked_for(tmp_path):
    file = write(tmp_path / "c.txt", " a  bear \r\n\r\n\tin the snow\n")
    assert read_own(file) == "a bear in the snow"
    assert read_own(file, keep_lines=True) == "a bear\nin the snow"


@pytest.mark.parametrize("ending", [".jsonl", ".csv"])
@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_files_give_captions_by_path(tmp_path, column, ending):
    rows = [("a.png", BEAR), ("./sub/b c.png", 'say "hi", bear'), ("sub\\d.png", "  two\nlines ")]
    if ending == ".csv":
        quoted = ['"{}"'.format(text.replace('"', '""')) for _, text in rows]
        content = f"file_name,size,{column}\n" + "".join(
            f"{name},3,{text}\n" for (name, _), text in zip(rows, quoted, strict=True)
        )
    else:
        content = "\n".join(json.dumps({"file_name": n, column: t}) for n, t in rows)
    found = read_metadata(write(tmp_path / f"metadata{ending}", content))
    assert found.captions == {
        "a.png": BEAR, "sub/b c.png": 'say "hi", bear', "sub/d.png": "two lines",
    }  # fmt: skip
    assert found.problems == found.notices == []


def test_lines_that_cannot_be_used_are_named_by_number_and_the_others_read(tmp_path):
    lines = [
        '{"file_name": "a.png", "text": "good"}',
        '{"file_name": "b.png", "text": ',
        "[1, 2]",
        "",
        '{"text": "of nothing"}',
        '{"file_name": "c.png", "text": 7}',
        '{"file_name": "d.png", "text": " "}',
        '{"file_name": "e.png", "text": "\\ud800"}',
        '{"file_name": "f.png", "label": 3}',
        '{"file_name": "a.png", "text": "another"}',
        "[" * 100_000,
        "1" * 10_000,
    ]
    found = read_metadata(write(tmp_path / "metadata.jsonl", "\n".join(lines)))
    assert found.captions == {"a.png": "good"}
    problems = " ".join(map(str, found.problems))
    for number in (2, 3, 5, 6, 7, 8, 11, 12):
        assert f"line {number}" in problems
    assert "line 4" not in problems and "line 1:" not in problems
    notices = " ".join(map(str, found.notices))
    assert "line 9" in notices and "line 10" in notices


def test_a_thousand_broken_lines_are_one_sentence(tmp_path):
    found = read_metadata(write(tmp_path / "metadata.jsonl", "{broken\n" * 1000))
    assert len(found.problems) == 1
    assert "line 1:" in str(found.problems[0]) and "and 995 more" in str(found.problems[0])


def test_rows_of_another_length_than_the_first_are_named(tmp_path):
    table = "file_name,text\na.png,red, unquoted\nb.png\nc.png,good\n"
    found = read_metadata(write(tmp_path / "metadata.csv", table))
    assert found.captions == {"c.png": "good"}
    assert "line 2" in str(found.problems[0]) and "line 3" in str(found.problems[0])


def test_a_metadata_file_in_another_encoding_is_a_problem(tmp_path):
    found = read_metadata(write(tmp_path / "metadata.jsonl", b'{"text": "gr\xfcn"}'))
    assert not found.captions and "UTF-8" in str(found.problems[0])


def test_paths_are_the_same_however_they_are_written():
    composed, apart = "é", "e\u0301"
    assert path_key(f"./a\\{apart}.png") == path_key(f"a/{composed}.png") == f"a/{composed}.png"
