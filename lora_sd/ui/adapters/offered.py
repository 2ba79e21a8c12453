"""The adapters that the page offers: those of runs, and uploaded files. Always by id, never by
path."""

import contextlib
import hashlib
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.errors import AdapterError, RunError, UserError
from lora_sd.run_folder import RunFolder, list_runs, open_run

UPLOADS = ".app/adapters"  # in the folder of all runs
UPLOAD_MARK = "upload:"


@dataclass(frozen=True)
class OfferedAdapter:
    """An adapter that can be chosen, by its id; `run` is None for an uploaded file."""

    id: str
    label: str
    file: Path
    run: RunFolder | None

    @property
    def file_name(self) -> str:
        """The name a download gets."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.id.removeprefix(UPLOAD_MARK)) + ".safetensors"

    @property
    def is_result(self) -> bool:
        """Whether it is what a whole run gave."""
        return self.run is not None and self.file == self.run.adapter_file

    def stamp(self) -> tuple[str, int, int]:
        """Changes when the file does."""
        found = self.file.stat()
        return str(self.file), found.st_mtime_ns, found.st_size

    def config(self) -> Config | None:
        """The settings it was trained with, when they are known."""
        if self.run is None:
            return None
        try:
            return config_from_values(read_yaml(self.run.config_file))
        except UserError:
            return None


def adapters_of(run: RunFolder) -> list[OfferedAdapter]:
    """A run's result, then its checkpoints, newest first."""
    found = []
    for file in run.adapter_files():
        if file == run.adapter_file:
            found.append(OfferedAdapter(run.name, run.name, file, run))
        else:
            saved = file.parent.name
            label = f"{run.name}, step {int(saved.rpartition('_')[2]):,}"
            found.append(OfferedAdapter(f"{run.name}/{saved}", label, file, run))
    return found


def offered_adapters(outputs: Path) -> list[OfferedAdapter]:
    """The results of all runs, newest first, then checkpoints, then uploaded files."""
    found = [adapter for run in list_runs(outputs) for adapter in adapters_of(run)]
    found.sort(key=lambda adapter: not adapter.is_result)
    return found + _uploaded(outputs)


def find_adapter(outputs: Path, adapter_id: object) -> OfferedAdapter:
    """The offered adapter of that id.

    Raises:
        AdapterError: it is not, or no longer, offered.
    """
    if isinstance(adapter_id, str):
        candidates = _uploaded(outputs)
        with contextlib.suppress(RunError):
            candidates += adapters_of(open_run(outputs, adapter_id.partition("/")[0]))
        for adapter in candidates:
            if adapter.id == adapter_id:
                return adapter
    raise AdapterError("Choose an adapter first: train one, or add a file.")


def _uploaded(outputs: Path) -> list[OfferedAdapter]:
    files = sorted((outputs / UPLOADS).glob("*.safetensors"))
    return [OfferedAdapter(UPLOAD_MARK + f.stem, f"{f.stem} (file)", f, None) for f in files]


def add_upload(outputs: Path, file: Path) -> OfferedAdapter:
    """Keep an uploaded adapter file under a safe and free name."""
    folder = outputs / UPLOADS
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:60] or "adapter"
    number, target = 1, folder / f"{stem}.safetensors"
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}.safetensors"
    shutil.copyfile(file, target)
    return find_adapter(outputs, UPLOAD_MARK + target.stem)


def download_copy(adapter: OfferedAdapter) -> Path:
    """A copy of the adapter in Gradio's own folder, under the name that the download gets.

    Only what lies there can be fetched by the browser; it is cleaned after a day.
    """
    key = hashlib.sha256(repr(adapter.stamp()).encode()).hexdigest()[:24]
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "downloads" / key
    copy = folder / adapter.file_name
    if not copy.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        staged = folder / f".tmp-{os.getpid()}"
        shutil.copyfile(adapter.file, staged)
        os.replace(staged, copy)
    return copy
