"""Train a LoRA adapter: `accelerate launch train_sd_lora.py --config configs/tiny.yaml`."""

from collections.abc import Sequence

from lora_sd.config import config_from_values, parse_command_line
from lora_sd.errors import run_program


def main(argv: Sequence[str]) -> int:
    """Check the settings before the slow imports, so that `--help` and errors come at once."""
    values, _, resume = parse_command_line(argv, "train_sd_lora.py")
    if resume is None:
        config_from_values(values)
    from lora_sd import train

    return train.main(argv)


if __name__ == "__main__":
    run_program(main)
