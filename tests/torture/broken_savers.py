"""Savers as many trainers have them, to see that the campaigns notice what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import torch

from lora_sd import checkpoint, durable
from lora_sd.checkpoint import ADAPTER, FILES, MANIFEST, PICTURES, STATE
from lora_sd.formats import save_adapter


def in_place() -> None:
    """Old checkpoints go first, the new one is written where it will lie, one is kept, and a
    checkpoint is taken for whole because it is there (as diffusers' example scripts do)."""

    def save(
        run: Any, step: int, adapter: Any, state: Any, identity: Any, keep: int, wait: Any = None
    ) -> Path:
        for old in checkpoint._folders(run):
            durable.remove_folder(old)
        final = run.checkpoint(step)
        final.mkdir()
        manifest = {
            "step": step,
            "step_pictures": identity.step_pictures,
            "base": identity.base,
            "states": sorted(state),
            "versions": checkpoint.versions(),
            "files": {},
            "config": identity.config,
        }
        (final / MANIFEST).write_text(json.dumps(manifest))
        (final / PICTURES).write_text(json.dumps(dict(identity.pictures)))
        save_adapter(adapter, final / ADAPTER, torch.float32, exact=True)
        torch.save(dict(state), final / STATE)
        manifest["files"] = {
            name: [(final / name).stat().st_size, durable.sha256(final / name)] for name in FILES
        }
        (final / MANIFEST).write_text(json.dumps(manifest))
        return final

    checkpoint.save = save
    checkpoint._read_manifest = lambda folder: json.loads((folder / MANIFEST).read_text())


def without_fsync() -> None:
    """Staged and renamed as ours, and nothing is forced onto the disk."""
    durable._sync = lambda path: None
    durable.sync_folder = lambda folder: None


def pruning_first() -> None:
    """Written as ours, after all old checkpoints have gone."""
    save = checkpoint.save

    def pruned(run: Any, *arguments: Any, **options: Any) -> Path:
        for old in checkpoint._folders(run):
            durable.remove_folder(old)
        return save(run, *arguments, **options)

    checkpoint.save = pruned


BROKEN = {"in-place": in_place, "no-fsync": without_fsync, "pruning-first": pruning_first}
