"""What a program says and how it ends when something is wrong, or when it is told to stop."""

import signal
import subprocess
import sys

import pytest

from lora_sd import durable, errors
from lora_sd.errors import printable, shown_list, shown_size

PROGRAM = """
import signal, sys, time
from pathlib import Path
from lora_sd import durable
from lora_sd.__main__ import stop
from lora_sd.errors import DiskFull, UserError, run_program

def main(argv):
    what = argv[0]
    if what == "print":
        print(argv[1] * 1_000_000)
    if what == "fail":
        raise UserError("'\\x1b[31m' is red.")
    if what == "full":
        raise DiskFull("No room.")
    if what == "write":
        with durable.staged(Path(argv[1])) as path:
            path.write_text("half")
            print("begun", flush=True)
            time.sleep(60)
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
signal.signal(signal.SIGTERM, stop)
run_program(main)
"""


def started(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def writing(file):
    """A process that has begun to write the file."""
    process = started("write", file)
    assert process.stdout.readline() == "begun\n"
    assert len(list(file.parent.iterdir())) == 1
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_program_says_so_in_a_line_and_leaves_nothing(number, tmp_path):
    process = writing(tmp_path / "a")
    process.send_signal(number)
    assert process.communicate(timeout=60) == ("", "Stopped.\n")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_program_left_is_swept_at_the_next_write(tmp_path):
    killed = writing(tmp_path / "a")
    killed.kill()
    killed.communicate()
    alive = started("write", tmp_path / "a")
    assert alive.stdout.readline() == "begun\n"
    assert len(list(tmp_path.iterdir())) == 1  # its own
    durable.write_text(tmp_path / "a", "whole")
    assert len(list(tmp_path.iterdir())) == 2  # what a living process writes stays
    alive.kill()
    alive.communicate()
    durable.write_text(tmp_path / "a", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_reader_that_has_seen_enough_is_no_error():
    process = started("print", "x")
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141
    process.stderr.close()


def test_what_the_terminal_cannot_show_is_escaped():
    process = started("print", "ü", env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": "."})
    assert process.communicate(timeout=60)[0].startswith("\\xfc")
    assert process.returncode == 0


def test_what_a_terminal_would_obey_is_escaped():
    process = started("fail")
    assert process.communicate(timeout=60)[1] == "error: '\\x1b[31m' is red.\n"
    assert process.returncode == 2
    assert printable("ü \x1b[31m\n") == "ü \\x1b[31m\\n"
    assert shown_list(["\x1b[31m"]) == "'\\x1b[31m'"


def test_an_error_says_its_exit_status():
    process = started("full")
    assert process.communicate(timeout=60)[1] == "error: No room.\n"
    assert process.returncode == errors.EXIT_DISK_FULL == 5
    states = {errors.BadNumbers: 6, errors.OutOfMemory: 7, errors.RunError: 2, errors.UserError: 2}
    assert {kind: kind("x").exit_status for kind in states} == states


@pytest.mark.parametrize(
    "size, said",
    [(312, "312 bytes"), (4300, "4.30 kB"), (4_300_000, "4.30 MB"), (1_200_000_000, "1.20 GB")],
)
def test_sizes_are_told_in_a_unit_that_shows_them(size, said):
    assert shown_size(size) == said
