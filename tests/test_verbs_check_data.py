"""`python -m lora_sd check-data`: what it prints, writes and returns."""

import json
import subprocess
import sys
from pathlib import Path

import awkward
import pytest
from PIL import Image

from lora_sd.__main__ import main
from lora_sd.errors import ConfigError, DataError, UserError

PROJECT = Path(__file__).resolve().parent.parent
ICONS = str(PROJECT / "assets" / "ink-icons")


def test_the_example_pictures_need_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", ICONS]) == 0
    said = capsys.readouterr().out
    assert "24 pictures can be used, 0 cannot, 0 to look at" in said
    assert "- Every caption has 'ink drawing': that may call the result in a prompt." in said
    assert "fox.png" in said and "fox, ink drawing, yellow background" in said


def test_settings_of_the_trainer_count_wherever_they_stand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = ["--data.resolution_px", "32", "--data.flip", ICONS, "--json"]
    after = [ICONS, "--json", "--data.resolution_px=32", "--no-data.upscale"]
    for arguments in (before, after):
        assert main(["check-data", *arguments]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["buckets"] == [{"size_px": [32, 32], "pictures": 24, "showings": 24.0}]


def test_the_table_tells_kinds_and_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{folder: '{ICONS}', resolution_px: [48, 64]}}\n")
    assert main(["check-data", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert "48 x 48, 64 x 64" in said and " training " not in said
    kept = f"[{{folder: '{ICONS}', kind: validation, resolution_px: [32, 48, 64]}}]"
    config.write_text(f"data: {{folder: '{ICONS}', resolution_px: 64, folders: {kept}}}\n")
    assert main(["check-data", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    training, validation = sorted(x for x in said.splitlines() if x.startswith("fox.png"))
    assert " training " in training and " 64 x 64 " in training
    assert " validation " in validation and "32 x 32 and 2 more" in validation


def test_a_config_file_is_read_and_flags_win(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{folder: '{ICONS}', resolution_px: 32, trigger_word: zwx}}\n")
    assert (
        main(["check-data", "--config", str(config), "--data.resolution_px", "48", "--json"]) == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["buckets"][0]["size_px"] == [48, 48]
    assert all(one["caption"].startswith("zwx, ") for one in said["pictures"])


def test_the_report_is_written_and_never_over_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    html = tmp_path / "r.html"
    assert main(["check-data", ICONS, "-o", str(html)]) == 0
    assert f"'{html}': " in capsys.readouterr().out
    assert html.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(UserError, match="exists already"):
        main(["check-data", ICONS, "-o", str(html)])
    assert main(["check-data", ICONS, "-o", str(html), "--overwrite"]) == 0
    with pytest.raises(UserError, match="must end in '.html'"):
        main(["check-data", ICONS, "-o", str(tmp_path / "r.png")])


def test_json_on_the_terminal_stays_json_when_a_file_is_written_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check-data", ICONS, "--json", "-o", str(tmp_path / "r.html")]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["used"] == 24


@pytest.mark.parametrize("bad, status", [("fail", 2), ("skip", 0)])
def test_the_exit_status_is_what_training_would_do(tmp_path: Path, bad: str, status: int) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    arguments = ["--data.caption", "a wall", "--data.bad_pictures", bad]
    assert main(["check-data", str(tmp_path), *arguments]) == status


def test_wrong_command_lines_are_told() -> None:
    with pytest.raises(ConfigError, match="no flag '--data.resolution'.*--data.resolution_px"):
        main(["check-data", ICONS, "--data.resolution", "3"])
    with pytest.raises(ConfigError, match="'data.resolution_px.0' is 'big'|resolution_px"):
        main(["check-data", ICONS, "--data.resolution_px", "big"])
    with pytest.raises(DataError, match="does not exist"):
        main(["check-data", "/nowhere"])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest undoes our filter
def test_every_awkward_picture_is_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = awkward.build(tmp_path / "awkward")
    arguments = ["--data.masks", "file", "--json", "-o", str(tmp_path / "r.html")]
    assert main(["check-data", str(tmp_path / "awkward"), *arguments]) == 2
    said = json.loads(capsys.readouterr().out)
    used = {one["name"]: one for one in said["pictures"]}
    left_out = {one["file"] for one in said["left_out"]}
    for one in expected:
        if one.is_used and min(one.size_px) >= said["step_px"]:
            assert used[one.name]["size_px"] == list(one.size_px)
            assert used[one.name]["caption"] == " ".join(one.caption.split())
        else:
            assert one.name not in used
    assert len(left_out) >= sum(not one.is_used for one in expected)


def test_nothing_of_torch_is_loaded_for_the_embedded_base() -> None:
    program = f"""
import sys
from lora_sd.__main__ import main
assert main(["check-data", {ICONS!r}, "--json"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
