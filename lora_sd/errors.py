"""The problems a user can cause, and the sentence they read.

Everything here is caught at the front doors: the terminal prints the sentences and exits with
status 2, the app shows them beside the form. Anything else that is raised is a bug of ours.
"""

import difflib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: stopped on request, everything saved, can go on
EXIT_INTERRUPTED = 130  # as shells say of Ctrl-C: 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader, such as `head`, has seen enough


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
    quoted = [f"'{printable(name)}'" for name in names[:most]]
    rest = len(names) - most
    if rest > 0:
        return f"{', '.join(quoted)} and {rest} more"
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def printable(text: str) -> str:
    """The text with what a terminal would obey, or cannot show, as in Python's source: '\\x1b'."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown_size(size_bytes: int) -> str:
    """'312 bytes', '4.30 MB', '1.20 GB'."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} bytes"


def nearest(wrong: str, known: Iterable[str]) -> str:
    """` Did you mean '...'?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def run_program(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main(argv)` as a program: user errors become sentences and exit status 2, Ctrl-C a line
    and 130, a reader that has gone 141 without a word. Characters that the terminal's encoding
    lacks are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    said: list[str] = []
    try:
        try:
            status = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except UserError as error:
        said = [f"error: {printable(problem)}" for problem in error.problems]
        status = EXIT_USER_ERROR
    except KeyboardInterrupt:
        said = ["Stopped."]
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_BROKEN_PIPE
    # Only now, as a progress bar leaves the line when the exception lets go of it.
    for line in said:
        print(line, file=sys.stderr)
    sys.exit(status)
