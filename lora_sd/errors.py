"""The problems a user can cause, and the sentence they read.

Everything here is caught at the front doors: the terminal prints the sentences and exits with the
error's status, the app shows them beside the form. Anything else that is raised is a bug of ours.
"""

import difflib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

# 0: done. 1: a bug of ours, with its traceback.
EXIT_USER_ERROR = 2
EXIT_DISK_FULL = 5  # no room for a checkpoint or the result: make room, then resume
EXIT_BAD_NUMBERS = 6  # loss or gradient are no finite numbers: the last good weights are saved
EXIT_OUT_OF_MEMORY = 7  # what was saved is whole; with less to keep in memory it can go on
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: stopped on request, everything saved, can go on
EXIT_INTERRUPTED = 130  # 128 + SIGINT: Ctrl-C, or the second one of a trainer: left at once
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE: the reader, such as `head`, has seen enough
EXIT_TERMINATED = 143  # 128 + SIGTERM, the second one of a trainer: left at once


class UserError(Exception):
    """One or more problems that the user can mend, all found at once, each a whole sentence.

    Attributes:
        exit_status: what a program ends with that it ends.
    """

    exit_status = EXIT_USER_ERROR

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


class DiskFull(RunError):
    """There is no room for what a run has to keep."""

    exit_status = EXIT_DISK_FULL


class BadNumbers(RunError):
    """Loss, gradient or weights are no finite numbers."""

    exit_status = EXIT_BAD_NUMBERS


class OutOfMemory(RunError):
    """A step wants more memory than there is."""

    exit_status = EXIT_OUT_OF_MEMORY


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


class _LastingStream:
    """A stream to a terminal or program that may go away, without this program ending for that."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # nobody will read there any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def run_program(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main(argv)` as a program: user errors become sentences and their exit status, Ctrl-C a
    line and 130, a reader that has gone 141 without a word. Characters that the terminal's encoding
    lacks are escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = cast(TextIO, _LastingStream(sys.stderr))
    said: list[str] = []
    try:
        try:
            status = main(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except UserError as error:
        said = [f"error: {printable(problem)}" for problem in error.problems]
        status = error.exit_status
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
