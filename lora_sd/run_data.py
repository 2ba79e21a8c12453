"""What a run trains on: its pictures read, class pictures drawn, the store that keeps what is
encoded, and what the log says of it all."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from lora_sd.base_model import BaseModel, TextEmbedding
from lora_sd.class_pictures import draw_missing
from lora_sd.config import Config
from lora_sd.data.augment import Variant, apply
from lora_sd.data.buckets import time_ids
from lora_sd.data.cache import to_pixels
from lora_sd.data.captions import plain_caption
from lora_sd.data.folder import read_folders
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.picture_set import LeftOut, Picture, PictureSet, load_picture
from lora_sd.data.store import DiskStore, MemoryStore, Store
from lora_sd.data.training_data import TrainingData
from lora_sd.data.views import View, describe_sizes
from lora_sd.generate import OnStep
from lora_sd.run_record import RunRecord
from lora_sd.stop_request import StopRequest

PROBED = 4
SMALLER = 0.75  # buckets of a resolution have at least this share of its area
SAID_WHERE_ON = (
    "shuffle_tags", "tag_dropout", "wildcards", "flip", "crop_jitter", "colour_jitter", "masks",
)  # fmt: skip
INDEX = "pictures.json"


def read_pictures(config: Config, stop: StopRequest, undrawn_too: bool = True) -> PictureSet:
    """Read the folders of the settings.

    Args:
        stop: a request ends the program, as nothing is there to be saved yet.
        undrawn_too: whether the folders are read that the base has to draw class pictures into.

    Raises:
        DataError: pictures or captions cannot be used; all at once.
    """
    folders = [one for one in folder_options(config) if undrawn_too or not one.class_pictures]
    with _bar("reading pictures") as bar:

        def count(done: int, of: int) -> bool:
            _show(bar, done, of)
            if stop.requested:
                raise KeyboardInterrupt
            return False

        index = cache_folder(config) / INDEX
        return read_folders(folders, config.data.bad_pictures, on_picture=count, index=index)


def folder_options(config: Config) -> list[FolderOptions]:
    """The folders of the settings, each with its own."""
    return [FolderOptions(**one) for one in config.data.folder_options()]


def wants_class_pictures(config: Config) -> bool:
    """Whether the base is to draw class pictures into some folder."""
    return any(one.class_pictures for one in folder_options(config))


def draw_class_pictures(base: BaseModel, config: Config, on_step: OnStep) -> list[str]:
    """Have the base draw the class pictures that are not there yet; sentences on what was drawn."""
    said = []
    for options in folder_options(config):
        if options.class_pictures:
            drawn = draw_missing(
                base,
                options,
                config.sample.steps,
                config.sample.guidance,
                config.train.seed,
                on_step,
                cache_folder(config) / INDEX,
            )
            if drawn:
                said.append(f"{drawn} class pictures were drawn into '{options.folder}'.")
    return said


def cache_folder(config: Config) -> Path:
    """Where encoded pictures and captions are kept on disk."""
    return Path(config.data.cache_folder or Path(config.output.folder) / ".cache")


def open_store(config: Config) -> Store:
    """Where encoded pictures and captions go."""
    return MemoryStore() if config.data.cache == "memory" else DiskStore(cache_folder(config))


@torch.no_grad()
def probe(
    base: BaseModel, views: Sequence[View], max_tokens: int
) -> tuple[Tensor, TextEmbedding, Tensor]:
    """(latents, texts, time ids) of a few training pictures of one size, to try the base on."""
    shown = [view for view in views if view.picture.options.kind == "training"]
    alike = [view for view in shown if view.crop.size_px == shown[0].crop.size_px][:PROBED]
    latents = []
    for view in alike:
        picture, mask = load_picture(view.picture)
        drawn, _ = apply(Variant(view.crop), picture, mask)
        latents.append(base.encode_picture(to_pixels(drawn)[None])[0])
    texts = [plain_caption(view.picture.caption, view.picture.options) for view in alike]
    ids = [time_ids(view.picture.size_px, view.crop) for view in alike]
    return torch.cat(latents), base.encode_text(texts, max_tokens), torch.tensor(ids)


def describe_base(base: BaseModel) -> str:
    """What the base was taken for."""
    kinds = {"sd15": "Stable Diffusion 1", "sd21": "Stable Diffusion 2", "sdxl": "SDXL"}
    family = kinds.get(base.family, "the embedded base" if base.family else "no known family")
    end = ", zero terminal SNR" if base.zero_terminal_snr else ""
    return f"Base model: '{base.name}': {family}, {base.prediction_type}{end}."


def describe(
    found: PictureSet,
    data: TrainingData,
    too_small: Sequence[LeftOut],
    steps: int,
    step_pictures: int,
) -> list[str]:
    """Lines for the log: what each folder brings, what is left out, what an epoch shows."""
    left_out = [*found.left_out, *too_small]
    views = [*data.shown, *data.held_out]
    lines = ["Pictures:"]
    groups: dict[tuple[FolderOptions, str, float], list[Picture]] = {}
    for picture in dict.fromkeys(view.picture for view in views):
        inside = str(Path(picture.name).parent)
        groups.setdefault((picture.options, inside, picture.repeats), []).append(picture)
    lines += [f"  {_folder_line(*key, pictures)}" for key, pictures in groups.items()]
    lines += [f"Left out: '{one.file}' {one.reason}" for one in left_out]
    epoch = data.order.mean_epoch_size
    lines.append(
        f"{len({view.picture.file for view in views})} pictures used, {len(left_out)} left out. An "
        f"epoch shows {epoch:g}: {describe_sizes(data.first_epoch())}."
    )
    lines.append(f"{steps} steps of {step_pictures}: {steps * step_pictures / epoch:.1f} epochs.")
    return lines


def _folder_line(
    options: FolderOptions, inside: str, repeats: float, pictures: Sequence[Picture]
) -> str:
    """'cats/10_sks cat': 20 for training, each 10 times an epoch; captions: 20 of .txt files"""
    sources = Counter(_source(picture.caption_source) for picture in pictures)
    captions = ", ".join(f"{count} of {source}" for source, count in sources.most_common())
    if options.kind == "training":
        often = f", each {repeats:g} times an epoch" if repeats != 1 else ""
    else:
        often = ", as often as all others together" if options.kind == "regularisation" else ""
    with_ = [
        name for name in SAID_WHERE_ON if getattr(options, name) not in (False, 0, "off", None)
    ]
    if options.trigger_word:
        with_.append(f"trigger word '{options.trigger_word}'")
    return (
        f"'{options.folder / inside}': {len(pictures)} for {options.kind}{often}; captions: "
        f"{captions}" + (f"; {', '.join(with_)}" if with_ else "")
    )


def _source(caption_source: str) -> str:
    """Where a caption came from, without the file's name."""
    for ending in (".txt", ".caption"):
        if caption_source.lower().endswith(ending):
            return f"{ending} files"
    return caption_source


def smaller_note(views: Sequence[View]) -> list[str]:
    """A sentence where pictures are shown at their own size, since they are not to be enlarged."""
    smaller = {}
    for view in views:
        options = view.picture.options
        sides = options.resolution_px
        if not options.upscale and math.prod(view.picture.size_px) < max(sides) ** 2 * SMALLER:
            smaller[view.picture.file] = view
    if not smaller:
        return []
    first = next(iter(smaller.values())).picture
    width, height = first.size_px
    return [
        f"{len(smaller)} pictures are smaller than the resolution and are shown at their own size, "
        f"such as '{first.name}' ({width} x {height}): data.upscale enlarges them."
    ]


def encode(data: TrainingData, record: RunRecord, stop: StopRequest, is_main: bool) -> list[str]:
    """Encode what the store lacks, with a bar and signs of life; sentences on it.

    A request to stop ends it after the next picture.
    """
    with _bar("encoding", is_main) as bar:

        def count(done: int, of: int) -> bool:
            _show(bar, done, of)
            record.beat(f"encoding {done} of {of}")
            return stop.requested

        return data.encode(count)


def _bar(what: str, is_main: bool = True) -> tqdm:
    """A bar for work before the first step, where that takes more than a moment."""
    return tqdm(desc=what, unit="picture", leave=False, delay=2.0, disable=not is_main)


def _show(bar: tqdm, done: int, of: int) -> None:
    bar.total = of
    bar.update(done - bar.n)
