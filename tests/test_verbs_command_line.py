"""`python -m lora_sd`: help without waiting, errors as sentences, nothing overwritten."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_sd.__main__ import main, overview
from lora_sd.errors import ConfigError, UserError
from lora_sd.verbs import SUMMARIES
from lora_sd.verbs.arguments import check_output, check_rank_limit, progress
from lora_sd.verbs.resize import parsed_size


def test_help_of_every_verb_has_an_example_and_needs_no_torch() -> None:
    program = """
import contextlib, io, sys
from lora_sd.__main__ import main
from lora_sd.verbs import SUMMARIES
for verb in SUMMARIES:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([verb, "--help"])
    assert f"example:\\n  python -m lora_sd {verb} " in out.getvalue(), out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100, verb
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_alone_it_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == overview()
    assert all(f"  {verb}" in overview() for verb in SUMMARIES)


def test_a_program_ends_with_status_2_and_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lora_sd", "resise", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "error: There is no verb 'resise'. Did you mean 'resize'?\n"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["resize", "a", "-o", "b", "--rnk", "3"], "no flag '--rnk'. Did you mean '--rank'"),
        (["resize", "a", "b", "-o", "c.safetensors"], "'b' is one argument too many"),
        (["resize", "a"], "required: -o/--output"),
        (["resize", "a", "-o", "b", "--size", "big"], "'big' is not a size such as 20MB"),
        (["convert", "a", "-o", "b", "--format", "peft"], "invalid choice: 'peft'"),
    ],
)
def test_wrong_command_lines_are_told(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        main(arguments)


def test_an_output_is_judged_before_any_work(tmp_path: Path) -> None:
    taken = tmp_path / "a.safetensors"
    taken.touch()
    check_output(taken, overwrite=True)
    check_output(tmp_path / "b.safetensors", overwrite=False)
    for path, sentence in [
        (taken, "exists already"),
        (tmp_path / "c.txt", "must end in '.safetensors'"),
        (tmp_path / "none" / "d.safetensors", "no folder"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(UserError, match=sentence):
            check_output(path, overwrite=False)


def test_rank_limits_are_judged_together() -> None:
    with pytest.raises(ConfigError) as found:
        check_rank_limit(0, -1, 1.5)
    assert len(found.value.problems) == 3


@pytest.mark.parametrize(
    "text, size", [("20MB", 20_000_000), ("1.5 MiB", 1_572_864), ("7kb", 7000), ("12", 12)]
)
def test_sizes(text: str, size: int) -> None:
    assert parsed_size(text) == size
    with pytest.raises(argparse.ArgumentTypeError):
        parsed_size(f"{text}x")


def test_progress_keeps_quiet_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_torch_threads_do_not_spin() -> None:
    assert torch.__version__
    program = "import lora_sd.__main__, os; print(os.environ['OMP_WAIT_POLICY'])"
    environment = {"PATH": "", "PYTHONPATH": "."}
    said = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert said.strip() == "PASSIVE"
