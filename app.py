"""The app: `python app.py`, then open the address that it prints."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lora_sd.errors import run_program
from lora_sd.ui import server


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="app.py",
        description="Train Stable Diffusion LoRA adapters in the browser.",
        epilog=f"A password for visitors is taken from {server.PASSWORD} or --password-file; an "
        "address that other machines reach wants one.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="port (%(default)s)")
    parser.add_argument(
        "--outputs", type=Path, default=Path("outputs"), help="folder of all runs (%(default)s)"
    )
    parser.add_argument(
        "--pictures", type=Path, help="a folder whose folders of pictures are offered for training"
    )
    parser.add_argument(
        "--models",
        type=Path,
        help="a folder whose checkpoints are offered as base models (models/ beside app.py)",
    )
    parser.add_argument("--password-file", type=Path, help="a file that holds the password")
    parser.add_argument("--language", help="of the page, as 'en' (default: the system's)")
    options = parser.parse_args(argv)
    password = server.read_password(options.password_file)
    server.serve(
        options.outputs,
        options.host,
        options.port,
        pictures=options.pictures,
        password=password,
        language=options.language,
        models=options.models,
    )
    return 0


if __name__ == "__main__":
    run_program(main)
