"""Save and resume a training, so that a kill at any moment costs minutes at most."""

import os
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write aside, then replace: there is always one whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(state, aside)
    os.replace(aside, path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state saved last, or None at the first start."""
    return torch.load(path, weights_only=False) if path.exists() else None
