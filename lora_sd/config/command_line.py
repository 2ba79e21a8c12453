"""The trainer's command line: a flag for every setting, and where to start from."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from pydantic_settings import CliSettingsSource, SettingsError

from lora_sd.config.settings import Config, hint, setting_names, settings
from lora_sd.errors import ConfigError, nearest

CHANGES_WITHOUT_SETTING = ("data", "base", "processes")
"""What else a change can be allowed of: the pictures and captions, the base model's weights, and
how many processes share a step."""


@dataclass(frozen=True)
class CommandLine:
    """What was typed: settings by group, unchecked, where to start from, and what may change of a
    run that goes on."""

    flags: dict[str, dict[str, Any]]
    config_file: Path | None
    resume: Path | None
    like: Path | None
    allowed: frozenset[str] = frozenset()

    def over(self, values: dict[str, Any]) -> dict[str, Any]:
        """Unchecked settings, overridden by the flags."""
        merged = dict(values)
        for group, given in self.flags.items():
            below = merged.get(group, {})
            merged[group] = {**below, **given} if isinstance(below, dict) else below
        return merged


def parse_command_line(argv: Sequence[str], program: str) -> CommandLine:
    """Take a command line apart.

    Raises:
        ConfigError: an unknown flag, a flag without its value, more than one start, or a change
            allowed of what does not exist.
    """
    parser = _Parser(
        prog=program,
        usage=f"{program} [--config FILE | --like ADAPTER] [--GROUP.SETTING VALUE]\n"
        f"       {program} --resume RUN [--GROUP.SETTING VALUE] [--allow-change NAME,NAME]",
        description="Train a LoRA adapter for Stable Diffusion on a folder of images.",
        epilog="A flag wins over the config file. Lists: repeat the flag, once for each entry.",
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings to start from, e.g. configs/tiny.yaml"
    )
    parser.add_argument(
        "--like",
        type=Path,
        metavar="ADAPTER",
        help="the settings that an adapter of ours was trained with, as its file tells them",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="go on with an interrupted run, e.g. outputs/tiny. Flags beside it change it: freely\n"
        "where that does not change what is learned (sample.*, output.*, caches, where\n"
        "things lie), otherwise with --allow-change",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="NAME,NAME",
        help="what may have changed of the run that goes on: settings, e.g. train.steps; 'data':\n"
        "its pictures and captions; 'base': the base model's weights; 'processes': how many share\n"
        "a step. With more train.steps the learning rate goes on as that of the longer run",
    )
    try:
        source: CliSettingsSource[_Parser] = CliSettingsSource(
            Config,
            root_parser=parser,
            parse_args_method=_without_text_lists,
            formatter_class=argparse.RawTextHelpFormatter,
            cli_avoid_json=True,
            cli_implicit_flags=True,
            cli_hide_none_type=True,
            cli_parse_args=list(argv),
        )
        flags = source()
    except SettingsError as error:
        raise ConfigError(f"A flag's value cannot be read: {error.__cause__ or error}.") from None
    plain = vars(parser.parse_args(list(argv)))
    for name in _text_lists():
        if plain.get(name):
            group, _, setting = name.partition(".")
            flags.setdefault(group, {})[setting] = plain[name]
    allowed = {name.strip() for text in plain["allow_change"] for name in text.split(",")} - {""}
    line = CommandLine(flags, plain["config"], plain["resume"], plain["like"], frozenset(allowed))
    starts = [path for path in (line.config_file, line.resume, line.like) if path]
    if len(starts) > 1:
        raise ConfigError("Give one of --config, --like and --resume.")
    if allowed and not line.resume:
        raise ConfigError("--allow-change is for a run that goes on: give --resume, too.")
    known = [*setting_names(), *CHANGES_WITHOUT_SETTING]
    if unknown := sorted(allowed - set(known)):
        raise ConfigError(
            [
                f"--allow-change: there is no setting '{name}'.{nearest(name, known)}"
                for name in unknown
            ]
        )
    return line


class _Parser(argparse.ArgumentParser):
    """Errors are ours to phrase: a sentence, with the nearest flag, instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2].split()
        flags = [flag for flag in unknown if flag.startswith("--")]
        if flags:
            known = [f"--{name}" for name in setting_names()]
            raise ConfigError(
                [f"There is no flag '{flag}'.{hint(flag.split('=')[0], known)}" for flag in flags]
            )
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. --help lists the flags.")


def _text_lists() -> list[str]:
    """Settings that are lists of texts. An entry may hold commas, quotes and brackets, as prompts
    do, and pydantic-settings splits entries at commas: these are taken from argparse directly."""
    return [name for name, field in settings() if field.annotation == list[str]]


def _without_text_lists(
    parser: _Parser, args: Sequence[str], namespace: Any = None
) -> argparse.Namespace:
    parsed = argparse.ArgumentParser.parse_args(parser, args, namespace)
    for name in _text_lists():
        if hasattr(parsed, name):
            delattr(parsed, name)
    return parsed
