"""Train a LoRA adapter: `accelerate launch train_sd_lora.py --config configs/tiny.yaml`."""

import os
from collections.abc import Sequence

from lora_sd.config import config_from_values, parse_command_line, read_yaml
from lora_sd.errors import ConfigError, RunError, run_program
from lora_sd.run_folder import RunFolder


def main(argv: Sequence[str]) -> int:
    """Train as the command line says; the exit status (0 finished, 75 stopped and resumable).

    The settings are checked before the slow imports, so that `--help` and errors come at once.
    """
    values, config_file, resume = parse_command_line(argv, "train_sd_lora.py")
    run = None
    if resume is not None:
        if values or config_file:
            raise ConfigError(
                "--resume goes on with the run's own settings; give it alone, or start a new run."
            )
        run = RunFolder(resume)
        if not os.path.isfile(run.config_file):
            raise RunError(f"'{resume}' is not a run folder: it holds no config.yaml.")
        values, default_name = read_yaml(run.config_file), run.name
    elif config_file is None:
        default_name = "run"
    elif config_file.name == "config.yaml":  # a run's own, to run it again
        default_name = config_file.resolve().parent.name
    else:
        default_name = config_file.stem
    config = config_from_values(values)

    from lora_sd.train import train

    return train(config, default_name, run)


if __name__ == "__main__":
    run_program(main)
