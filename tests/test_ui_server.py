"""The server: how it begins."""

import socket
import subprocess
import sys
from pathlib import Path

from lora_sd.config import Config
from lora_sd.ui import server
from lora_sd.ui.launch import PROJECT, Trainer
from lora_sd.ui.page import build_page
from lora_sd.ui.queue import QueuedRun, RunQueue


def test_the_page_is_built_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from lora_sd.ui.page import build_page; "
        "build_page(pathlib.Path(sys.argv[1])); "
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "outputs")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_taken_port_and_a_wrong_folder_are_sentences(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (tmp_path / "file").touch()
        for arguments, words in (
            (["--port", port, "--outputs", str(tmp_path)], f"error: Port {port} of"),
            (["--port", "99999", "--outputs", str(tmp_path)], "error: Port 99999 of"),
            (["--outputs", str(tmp_path / "file")], "cannot be used"),
            (["--pictures", str(tmp_path / "none")], "is not a folder"),
            (["--models", str(tmp_path / "none")], "is not a folder"),
            (["--host", "0.0.0.0", "--outputs", str(tmp_path)], "Set a password"),
            (["--password-file", str(tmp_path / "file")], "has at least 8 characters"),
            (["--language", "xx", "--outputs", str(tmp_path)], "no texts in 'xx'"),
        ):
            done = subprocess.run(
                [sys.executable, "app.py", *arguments], cwd=PROJECT, capture_output=True, text=True
            )
            assert done.returncode == 2, done.stderr
            assert words in done.stderr and "Traceback" not in done.stderr


def test_checkpoints_of_another_folder_are_offered(tmp_path: Path) -> None:
    models = tmp_path / "checkpoints"
    models.mkdir()
    (models / "my-own.safetensors").touch()
    page = build_page(tmp_path / "outputs", models=models)
    bases = [p for p in page.blocks.values() if getattr(p, "elem_id", None) == "base-model"]
    assert ("my-own.safetensors", "my-own.safetensors") in bases[0].choices


def test_what_waits_is_told_at_the_end(tmp_path: Path) -> None:
    queue = RunQueue(Trainer(tmp_path))
    assert server.left_behind(tmp_path) == []
    with queue._trainer.alone():
        queue._append(QueuedRun("1", "mine", Config().to_yaml()))
    assert server.left_behind(tmp_path) == [
        "What waits in the queue begins when the app runs again."
    ]
    queue.hold()
    assert server.left_behind(tmp_path) == []
