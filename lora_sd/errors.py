"""The problems a user can cause, and the sentence they read.

Everything here is caught at the front doors: the terminal prints the sentences and exits with
status 2, the app shows them beside the form. Anything else that is raised is a bug of ours.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: stopped on request, everything saved, can go on


class UserError(Exception):
    """One or more problems that the user can mend, all found at once, each a whole sentence."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """A setting is unknown, missing or out of range."""


class DataError(UserError):
    """The image folder, an image or a caption cannot be used."""


class BaseModelError(UserError):
    """The base model cannot be found, read or used."""


class AdapterError(UserError):
    """An adapter file is broken, or belongs to another model."""


class RunError(UserError):
    """A run folder cannot be used: it is taken, locked, damaged or does not exist."""


class Problems:
    """Gathers the problems of several checks, so that they are told together."""

    def __init__(self) -> None:
        self._found: list[str] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep a UserError raised inside for later."""
        try:
            yield
        except UserError as error:
            self._found += error.problems

    def tell(self) -> None:
        """Raises UserError when any problem was gathered."""
        if self._found:
            raise UserError(self._found)


def shown_list(names: Sequence[str], most: int = 5) -> str:
    """`'a', 'b' and 3 more`: names for a sentence, cut where a reader stops reading."""
    quoted = [f"'{name}'" for name in names[:most]]
    rest = len(names) - most
    if rest > 0:
        return f"{', '.join(quoted)} and {rest} more"
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def nearest(wrong: str, known: Iterable[str]) -> str:
    """` Did you mean '...'?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def run_program(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main(argv)` as a program: user errors become sentences and exit status 2."""
    try:
        status = main(sys.argv[1:])
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        status = EXIT_USER_ERROR
    sys.exit(status)
