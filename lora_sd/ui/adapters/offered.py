"""The adapters that the page offers: those of runs, and imported files. Always by id, never by
path."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_sd import durable
from lora_sd.config import Config, config_from_values, read_yaml
from lora_sd.errors import AdapterError, RunError, UserError
from lora_sd.known_bases import PUBLISHED
from lora_sd.run_folder import RunFolder, list_runs, open_run
from lora_sd.ui.texts import say

UPLOADS = ".app/adapters"  # in the folder of all runs
UPLOAD_MARK = "upload:"
BEST = "best"


@dataclass(frozen=True)
class OfferedAdapter:
    """An adapter that can be chosen, by its id; `run` is None for an imported file."""

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

    def base(self) -> str:
        """The base model that it was trained on or said to be for; '' where nobody said, or named
        no more than a family."""
        said = self.said_base()
        return "" if said in PUBLISHED else said

    def said_base(self) -> str:
        """`base`, or the name of a family: 'sd15'."""
        if self.run is not None:
            config = self.config()
            return config.base.model if config else ""
        try:
            said = json.loads(said_file(self.file).read_text(encoding="utf-8"))
            return str(said["base"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def adapters_of(run: RunFolder) -> list[OfferedAdapter]:
    """A run's result, its best by validation, then its checkpoints, newest first."""
    found = []
    for file in run.adapter_files():
        if file == run.adapter_file:
            found.append(OfferedAdapter(run.name, run.name, file, run))
        else:
            saved = file.parent.name
            label = say("adapters.of_step", run=run.name, step=int(saved.rpartition("_")[2]))
            found.append(OfferedAdapter(f"{run.name}/{saved}", label, file, run))
    if run.best_file.is_file():
        label = say("adapters.of_best", run=run.name)
        best = OfferedAdapter(f"{run.name}/{BEST}", label, run.best_file, run)
        found.insert(bool(found and found[0].is_result), best)
    return found


def offered_adapters(outputs: Path) -> list[OfferedAdapter]:
    """The results of all runs, newest first, then what else they saved, then imported files."""
    found = [adapter for run in list_runs(outputs) for adapter in adapters_of(run)]
    found.sort(key=lambda adapter: not adapter.is_result)
    return found + imported(outputs)


def find_adapter(outputs: Path, adapter_id: object) -> OfferedAdapter:
    """The offered adapter of that id.

    Raises:
        AdapterError: it is not, or no longer, offered.
    """
    if isinstance(adapter_id, str):
        candidates = imported(outputs)
        with contextlib.suppress(RunError):
            candidates += adapters_of(open_run(outputs, adapter_id.partition("/")[0]))
        for adapter in candidates:
            if adapter.id == adapter_id:
                return adapter
    raise AdapterError(say("adapters.choose_first"))


def imported(outputs: Path) -> list[OfferedAdapter]:
    """The imported files, by name."""
    files = sorted((outputs / UPLOADS).glob("*.safetensors"))
    return [
        OfferedAdapter(UPLOAD_MARK + f.stem, say("adapters.of_file", name=f.stem), f, None)
        for f in files
        if not f.name.startswith(".")
    ]


def add_upload(outputs: Path, file: Path, base: str = "") -> OfferedAdapter:
    """Keep an uploaded adapter file under a safe and free name.

    Args:
        base: the base model or family that it is said to be for, where its layers do not tell.
    """
    target = free_file(outputs, file.stem)
    shutil.copyfile(file, target)
    if base:
        durable.write_text(said_file(target), json.dumps({"base": base}))
    return find_adapter(outputs, UPLOAD_MARK + target.stem)


def free_file(outputs: Path, wish: str) -> Path:
    """Where an imported file can be kept: under the name wished for, made safe, or with a
    number."""
    folder = outputs / UPLOADS
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", wish).strip("-._")[:60] or "adapter"
    number, target = 1, folder / f"{stem}.safetensors"
    while target.exists():
        number += 1
        target = folder / f"{stem}-{number}.safetensors"
    return target


def said_file(file: Path) -> Path:
    """Where it is kept what somebody said of an imported file."""
    return file.with_suffix(".json")


def download_copy(adapter: OfferedAdapter) -> Path:
    """A copy of the adapter in Gradio's own folder, under the name that the download gets.

    Only what lies there can be fetched by the browser; it is cleaned after a day.
    """
    copy = download_place(adapter) / adapter.file_name
    if not copy.is_file():
        copy.parent.mkdir(parents=True, exist_ok=True)
        staged = copy.with_name(f".tmp-{os.getpid()}")
        shutil.copyfile(adapter.file, staged)
        os.replace(staged, copy)
    return copy


def download_place(adapter: OfferedAdapter) -> Path:
    """The folder in Gradio's own for the adapter's downloads; another one once the file changes."""
    key = hashlib.sha256(repr(adapter.stamp()).encode()).hexdigest()[:24]
    return Path(os.environ["GRADIO_TEMP_DIR"]) / "downloads" / key
