"""What launched the trainer, and how many cores that leaves it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lora_sd.launcher import launcher, take_all_cores

PROGRAM = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from lora_sd.launcher import take_all_cores
take_all_cores()
print(os.environ.get("OMP_NUM_THREADS", "all"))
"""


def test_what_is_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: said)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    for words, launches in [
        (["/venv/bin/python", "/venv/bin/accelerate", "launch", "train_sd_lora.py"], True),
        (["python", "-m", "accelerate.commands.launch", "--quiet", "train_sd_lora.py"], True),
        (["/usr/bin/python3", "-u", "/usr/bin/torchrun", "train_sd_lora.py"], True),
        (["bash", "/home/me/accelerate-jobs/run.sh"], False),
        (["-bash"], False),
    ]:
        said[:] = words
        assert (launcher() is not None) == launches
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    said[:] = ["torchrun"]
    assert launcher() is None


@pytest.mark.parametrize(
    "flags, environment, configured, cores",
    [
        ([], {}, False, "all"),
        ([], {"OMP_NUM_THREADS": "1"}, False, "1"),
        pytest.param(
            ["--num_cpu_threads_per_process", "1"], {}, False, "1", marks=pytest.mark.slow
        ),
        pytest.param([], {}, True, "1", marks=pytest.mark.slow),
    ],
)
def test_accelerate_s_one_core_is_heeded_where_somebody_has_said_it(
    tmp_path, flags, environment, configured, cores
):
    script = tmp_path / "trainer.py"
    script.write_text(PROGRAM)
    if configured:
        (tmp_path / "accelerate").mkdir()
        (tmp_path / "accelerate" / "default_config.yaml").write_text("num_processes: 1\n")
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *flags, str(script)],
        env={**own, **environment, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [cores], done.stderr


def test_each_of_several_processes_keeps_its_one_core(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(psutil.Process, "cmdline", lambda _: ["torchrun"])
    monkeypatch.setattr(psutil.Process, "environ", lambda _: {})
    monkeypatch.setenv("WORLD_SIZE", "2")
    take_all_cores()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("WORLD_SIZE", "1")
    take_all_cores()
    assert "OMP_NUM_THREADS" not in os.environ
