"""Adapter files, and pictures: saving, loading, scanning, caching.

Processor time of this process, all its threads together; what waits for the disk is not in it. An
adapter of Stable Diffusion 1.5's shapes (attention-conv, rank 16) is written in float16 and read;
beside it stands what the safetensors library alone takes for the same tensors. Pictures are of
1 MP, JPEG and PNG by turns: looked at for the first time, once more with the index of the first
time, and encoded by the embedded base's VAE at 64 px into an empty cache on disk.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file

from lora_sd.adapter import Adapter
from lora_sd.base_loading import load_base_model
from lora_sd.base_model import BaseModel
from lora_sd.data.cache import encode_views
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import PictureSet
from lora_sd.data.store import DiskStore
from lora_sd.data.views import make_views
from lora_sd.formats import load_adapter, save_adapter
from lora_sd.known_bases import published_configs
from lora_sd.layer_names import layer_shapes
from tools.bench.cases import EMBEDDED, MINIATURES, Case
from tools.bench.errors import BenchError
from tools.bench.generation import random_adapter
from tools.bench.rounds import Spread, now, ratios, take_turns
from tools.bench.table import Row

SIDE_PX = 1024


def measure_adapter_files(rounds: int, unet: str = "sd15", rank: int = 16) -> list[Row]:
    """Rows on saving and loading an adapter, in each format."""
    case = Case("", unet, "attention-conv", 1, 32, rank=rank)
    with torch.device("meta"):
        config = MINIATURES.get(unet) or published_configs(unet)["unet"]
        model = UNet2DConditionModel.from_config(config)
    adapter, shapes = random_adapter(model, case), layer_shapes({"unet": model})
    with tempfile.TemporaryDirectory() as folder:
        return [
            row
            for format in ("kohya", "diffusers")
            for row in _format_rows(adapter, shapes, Path(folder), format, rounds)
        ]


def _format_rows(
    adapter: Adapter, shapes: Mapping[str, torch.Size], folder: Path, format: str, rounds: int
) -> list[Row]:
    file, plain = folder / f"{format}.safetensors", folder / f"{format}-plain.safetensors"
    save_adapter(adapter, file, format=format)
    if load_adapter(file, shapes).layers.keys() != adapter.layers.keys():
        raise BenchError(f"what was saved in {format}'s format is not what is loaded")
    wide = {key: tensor.float() for key, tensor in load_file(file).items()}

    def plain_save() -> None:
        save_file({key: tensor.half() for key, tensor in wide.items()}, plain)

    def plain_load() -> None:
        for tensor in load_file(plain).values():
            tensor.clone()  # it is read when it is used

    turns = take_turns(
        {
            "plain save": _timed(plain_save),
            "save": _timed(lambda: save_adapter(adapter, file, format=format)),
            "plain load": _timed(plain_load),
            "load": _timed(lambda: load_adapter(file, shapes)),
        },
        rounds,
    )
    rows = []
    for what in ("save", "load"):
        about = f"adapter of {file.stat().st_size / 1e6:.3g} MB, {format}: {what}"
        rows.append(Row("files", about, Spread.of([1000 * one for one in turns[what]]), "ms"))
        against = ratios(turns[what], turns[f"plain {what}"])
        rows.append(Row("files", f"{about} / safetensors alone", against))
    return rows


def measure_pictures(pictures: int, rounds: int) -> list[Row]:
    """Rows on looking at pictures and on encoding them, in pictures a second."""
    base = load_base_model(EMBEDDED, torch.device("cpu"), torch.float32)
    found: dict[str, list[float]] = {"first scan": [], "second scan": [], "caching of latents": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pictures"
        make_pictures(folder, pictures)
        for number in range(rounds):
            index = Path(name) / f"index-{number}.json"
            for scan in ("first scan", "second scan"):
                began = now("cpu")
                known = read_folders([FolderOptions(folder)], index=index)
                found[scan].append(pictures / (now("cpu") - began))
            found["caching of latents"].append(
                pictures / _encoding_s(base, known, Path(name) / f"cache-{number}", pictures)
            )
    return [
        Row("files", f"{what}, {pictures} pictures of 1 MP", Spread.of(values), "images/s")
        for what, values in found.items()
    ]


def make_pictures(folder: Path, pictures: int) -> None:
    """Pictures that compress like photographs, each with a caption: soft shapes, a little noise."""
    folder.mkdir()
    for number in range(pictures):
        random = np.random.default_rng(number)
        soft = Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8))
        soft = soft.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        noise = random.integers(-4, 5, (SIDE_PX, SIDE_PX, 1), np.int16)
        pixels = (np.asarray(soft, np.int16) + noise).clip(0, 255).astype(np.uint8)
        suffix = ".png" if number % 2 else ".jpg"
        Image.fromarray(pixels).save(folder / f"{number:03d}{suffix}", quality=92)
        (folder / f"{number:03d}.txt").write_text(f"picture {number}")


def _encoding_s(base: BaseModel, known: PictureSet, cache: Path, pictures: int) -> float:
    views, _ = make_views(known, base.size_step_px)
    began = now("cpu")
    encode_views(base, views, DiskStore(cache), on_done=lambda done, of: False)
    took = now("cpu") - began
    entries = sum(1 for file in cache.rglob("*") if file.is_file())
    if entries < pictures:
        raise BenchError(f"{entries} entries in the cache, of {pictures} pictures")
    return took


def _timed(do: Callable[[], object]) -> Callable[[], float]:
    def turn() -> float:
        began = now("cpu")
        do()
        return now("cpu") - began

    return turn
