"""`accelerate launch` as the app uses it: what it writes last is how the trainer ended.

accelerate's own program ends with 1 whatever the trainer ended with, so that nobody learns of a
kill for want of memory. To be run as a file, with `python -P`: it imports nothing of this package.
"""

import subprocess
import sys
from collections.abc import Sequence

ENDED = "The trainer ended: "


def main(arguments: Sequence[str]) -> int:
    """Launch; the trainer's exit status, negative for a signal.

    Args:
        arguments: as of `accelerate launch`.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    try:
        launch_command(launch_command_parser().parse_args(arguments))
    except subprocess.CalledProcessError as error:
        return error.returncode
    except Exception as error:  # of several processes, by torch
        first_failure = getattr(error, "get_first_failure", None)
        if first_failure is None:
            raise
        return int(first_failure()[1].exitcode)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    print(f"\n{ENDED}{code}", file=sys.stderr, flush=True)
    sys.exit(code if code >= 0 else 128 - code)
