"""The campaigns notice savers that lose runs; `make torture`."""

from subprocess import CompletedProcess

import pytest

from tests.torture.programs import ran

pytestmark = [pytest.mark.torture, pytest.mark.slow, pytest.mark.timeout(3600)]


def killed(kills: int, *options: str) -> CompletedProcess[str]:
    """A small kill campaign."""
    seed, variants = ("--seed", "1"), ("--variants", "dropout")
    return ran("kill_campaign", "--kills", str(kills), *seed, *variants, *options)


def test_kills_find_a_saver_that_writes_in_place():
    done = killed(25, "--broken", "in-place")
    assert done.returncode == 1
    assert " 0 failed resumes" not in done.stdout and "failed resumes" in done.stdout


def test_kills_find_a_saver_that_removes_the_old_ones_first():
    done = killed(15, "--broken", "pruning-first")
    assert done.returncode == 1
    assert "the newest whole checkpoint went from" in done.stdout


def test_what_was_not_seeded_is_not_equal():
    done = ran("bit_equality", "--most", "1", "--without-seeds")
    assert done.returncode == 1 and "differs: " in done.stdout


def test_a_few_kills_of_ours_find_nothing():
    done = ran("kill_campaign", "--kills", "20", "--seed", "2")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("broken", ["in-place", "no-fsync", "pruning-first"])
def test_cutting_off_finds_what_is_wrong_with_other_savers(broken):
    done = ran("crash_points", "--quick", "--broken", broken)
    assert done.returncode == 1 and " 0 problems" not in done.stdout
