"""Train a LoRA adapter: `accelerate launch train_sd_lora.py --config configs/tiny.yaml`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_sd import changes
from lora_sd.config import CommandLine, config_from_values, parse_command_line, read_yaml
from lora_sd.errors import ConfigError, run_program
from lora_sd.launcher import take_all_cores
from lora_sd.run_folder import RunFolder, run_to_resume
from lora_sd.stop_request import StopRequest


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; the exit status (0 finished, 75 stopped and resumable).

    The settings are checked before the slow imports, so that `--help` and errors come at once.
    """
    stop = StopRequest()
    take_all_cores()
    line = parse_command_line(argv, "train_sd_lora.py")
    run = None
    if line.resume is not None:
        run, values = _resumed(line.resume, line)
        default_name = run.name
    elif line.like is not None:
        settings, default_name = _settings_like(line)
        values = line.over(settings)
    elif line.config_file is not None:
        values, default_name = line.over(read_yaml(line.config_file)), line.config_file.stem
        if line.config_file.name == "config.yaml":  # a run's own, to run it again
            default_name = line.config_file.resolve().parent.name
    else:
        values, default_name = line.over({}), "run"
    config = config_from_values(values)

    from lora_sd.train import train

    return train(config, default_name, run, line.allowed, stop)


def _resumed(path: Path, line: CommandLine) -> tuple[RunFolder, dict[str, Any]]:
    """(the run to go on with, its settings with those of the flags).

    Raises:
        RunError: there is no such run, or a flag changes what is not allowed to change.
    """
    run = run_to_resume(path)
    own = read_yaml(run.config_file)
    values = line.over(own)
    if line.flags:
        was, now = config_from_values(own), config_from_values(values)
        changed = changes.of_settings(was.model_dump(), now.model_dump())
        changes.check(run, changed, line.allowed)
    return run, values


def _settings_like(line: CommandLine) -> tuple[dict[str, Any], str]:
    """(settings, name) in an adapter's file; what it leaves out must be on the command line.

    Raises:
        ConfigError: all that is missing, at once.
    """
    from lora_sd.adapter_metadata import settings_like

    assert line.like is not None
    values, name, further = settings_like(line.like)
    if further and "folders" not in line.flags.get("data", {}):
        print(
            f"Note: '{line.like}' was trained on {further} further folders, and this run is not: "
            f"--data.folders adds them.",
            file=sys.stderr,
        )
    missing = []
    if not {"folder", "folders"} & line.flags.get("data", {}).keys():
        missing.append("where its pictures lie: add --data.folder")
    if "model" not in values.get("base", {}) and "model" not in line.flags.get("base", {}):
        missing.append("where its base model lies: add --base.model")
    if missing:
        raise ConfigError([f"'{line.like}' does not say {what}." for what in missing])
    return values, name


if __name__ == "__main__":
    run_program(main)
