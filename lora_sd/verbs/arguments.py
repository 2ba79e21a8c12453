"""What the verbs' command lines share: errors as sentences, output files, progress."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

from lora_sd import durable
from lora_sd.errors import ConfigError, UserError, nearest

DTYPES = ("float16", "bfloat16", "float32")
FORMATS = ("kohya", "diffusers")

Item = TypeVar("Item")


class Watch(Protocol):
    """Wraps a verb's walk, to show how far it is, or to end it by raising."""

    def __call__(
        self, items: Iterable[Item], what: str, total: int | None = None, unit: str = "layer"
    ) -> Iterable[Item]: ...


class Parser(argparse.ArgumentParser):
    """Errors are ours to phrase: a sentence with the nearest flag, instead of a page of usage."""

    def __init__(self, prog: str, description: str, example: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n{example.rstrip()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            raise ConfigError([_unknown(word, known) for word in unknown])
        raise ConfigError(
            f"{message[:1].upper()}{message[1:].rstrip('.')}. `{self.prog} --help` explains."
        )


def _unknown(word: str, flags: Sequence[str]) -> str:
    if word.startswith("-"):
        return f"There is no flag '{word}'.{nearest(word.split('=')[0], flags)}"
    return f"'{word}' is one argument too many."


def add_output(parser: argparse.ArgumentParser) -> None:
    """--output and --overwrite."""
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True, help="the file to write"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write it even if the file exists already"
    )


def add_base(parser: argparse.ArgumentParser, also_for: str = "") -> None:
    """--base; `also_for` is what it is for besides telling the adapter's layers."""
    what = "the base model (tiny-sd, a diffusers folder or a .safetensors file)"
    need = "where the adapter's layers do not tell its family (sd15, sd21 or sdxl will do then)"
    parser.add_argument("--base", metavar="MODEL", help=f"{what}: {also_for}{need}")


def add_allow_partial(parser: argparse.ArgumentParser, also: str = "") -> None:
    """--allow-partial; `also` is what is left out besides what cannot be read."""
    parser.add_argument(
        "--allow-partial",
        action="store_true",
        help=f"leave out what of an adapter cannot be read{also}, and say what that was",
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype; None stands for the source's own."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision of the numbers (default: as in the source)"
    )


def add_rank_limit(parser: argparse.ArgumentParser, default: int | None = None) -> None:
    """--rank, --conv-rank and --energy; `default` of --rank, None: no limit."""
    what = "highest rank, of linear layers and text encoders"
    said = what if default is None else f"{what} (default: {default})"
    parser.add_argument("--rank", type=int, default=default, metavar="N", help=said)
    parser.add_argument(
        "--conv-rank", type=int, metavar="N", help="highest rank of convolutions (default: --rank)"
    )
    parser.add_argument(
        "--energy", type=float, metavar="SHARE", help="share of each layer's energy to keep: 0.95"
    )


def check_rank_limit(rank: int | None, conv_rank: int | None, energy: float | None) -> None:
    """Raises ConfigError for ranks below 1, and an energy outside 0..1."""
    problems = []
    for flag, value in (("--rank", rank), ("--conv-rank", conv_rank)):
        if value is not None and value < 1:
            problems.append(f"{flag} is {value}; it must be 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        problems.append(f"--energy is {energy:g}; it is a share above 0 and up to 1, such as 0.95.")
    if problems:
        raise ConfigError(problems)


def check_output(path: Path, overwrite: bool, suffix: str = ".safetensors") -> None:
    """Whether `path` may be written, asked before any work is done.

    Raises:
        UserError: it exists and `overwrite` is False, its folder does not exist, it is a folder,
            its name does not end in `suffix`, or no file can have it.
    """
    durable.check_place(path)
    problems = []
    if path.suffix.lower() != suffix:
        problems.append(f"The output '{path}' must end in '{suffix}'.")
    if path.is_dir():
        problems.append(f"The output '{path}' is a folder; name a file in it.")
    elif path.exists() and not overwrite:
        problems.append(f"'{path}' exists already. Name another file, or add --overwrite.")
    elif not path.parent.is_dir():
        problems.append(f"There is no folder '{path.parent}' to write '{path.name}' into.")
    if problems:
        raise UserError(problems)


def progress(
    items: Iterable[Item], what: str, total: int | None = None, unit: str = "layer"
) -> Iterable[Item]:
    """The items, with a progress bar on stderr where that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, total=total, unit=unit, leave=False, disable=None)


def tell_written(path: Path, facts: Iterable[str], notices: Iterable[str]) -> None:
    """Print what a verb wrote: a line of facts on the file, then the notices."""
    print(f"'{path}': {', '.join(facts)}")
    for notice in notices:
        print(notice)


def add_trainer_settings(parser: argparse.ArgumentParser) -> None:
    """Take every setting of the trainer as a flag, too; `options.settings` keeps them as they were
    typed, for `parse_command_line`."""
    from lora_sd.config import settings  # slow to import, and two verbs want it

    parser.set_defaults(settings=[])
    for name, field in settings():
        takes = 0 if field.annotation is bool else None
        names = [f"--{name}", f"--no-{name}"] if takes == 0 else [f"--{name}"]
        parser.add_argument(*names, nargs=takes, action=_Setting, help=argparse.SUPPRESS)


class _Setting(argparse.Action):
    """Keeps a flag of the trainer for `parse_command_line`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        given = [] if values == [] else [values]
        namespace.settings = [*namespace.settings, flag, *given]
