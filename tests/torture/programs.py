"""The campaigns, run as programs: they fork, which a process with threads had better not."""

import os
import subprocess
import sys

from tests.conftest import PROJECT


def ran(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """What a program of this folder said, and how it ended."""
    return subprocess.run(
        [sys.executable, "-m", f"tests.torture.{name}", *arguments],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
