"""Every setting once: type, default, range and help.

YAML and command line in, YAML out, and the fields of the app's form. A flag has the name of its
YAML key: `train: {steps: 400}` is `--train.steps 400`. The command line wins over the file, the
file over the defaults. Nothing below the front doors sees these classes: `train`, `generate` and
the rest take plain parameters.
"""

from lora_sd.config.command_line import CommandLine, parse_command_line
from lora_sd.config.data import EXAMPLE_FOLDER, Resolution
from lora_sd.config.settings import Config, config_from_values, read_yaml, setting_names, settings

__all__ = [
    "EXAMPLE_FOLDER",
    "CommandLine",
    "Config",
    "Resolution",
    "config_from_values",
    "parse_command_line",
    "read_yaml",
    "setting_names",
    "settings",
]
