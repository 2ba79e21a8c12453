"""Encode every picture and caption once, so that neither VAE nor text encoder runs in training."""

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor

from lora_sd.base_model import BaseModel
from lora_sd.data.augment import Variant, apply, choose_variant, variant_count
from lora_sd.data.picture_set import Picture, load_picture
from lora_sd.data.store import Store
from lora_sd.data.views import View
from lora_sd.errors import DataError, shown_list

FORMAT = 1  # of entries and how they are made: another number makes all anew
MOST_READERS = 8  # threads that prepare pictures for a GPU
BYTES_PER_CHANNEL = 24  # that a VAE takes for each pixel; 22 were measured with SD 1.5's
Job = TypeVar("Job")
OnDone = Callable[[int, int], bool]


def latent_key(view: View, variant: int, base: BaseModel) -> str:
    """The key of a variant's latents: changes with all that they depend on."""
    return _latent_key(view.picture, choose_variant(view.picture, view.crop, variant), base)


def text_key(text: str, base: BaseModel, max_tokens: int) -> str:
    """The key of a text's embedding: changes with all that it depends on."""
    return _digest("text", text, max_tokens, base.text_fingerprint())


def encode_views(base: BaseModel, views: Sequence[View], store: Store, *, on_done: OnDone) -> int:
    """Put the latents of every variant of every view into the store; how many it did not have.

    An entry holds 'mean' and 'deviation' (channels, height, width), the VAE's posterior, scaled,
    and 'mask' (1, height, width), 0 to 1, where the picture has one; float32. It depends on its
    picture alone, not on how many are encoded at the same time.

    Args:
        on_done: called in this thread with (entries done, of how many); when it returns True,
            encoding stops, and what is done stays.

    Raises:
        DataError: files have changed since they were checked, or the VAE's values for some
            pictures are not finite numbers; all at once, after the others are done.
        UserError: the store cannot be written.
    """
    wanted = _wanted(views, base)
    in_parallel = base.device.type == "cpu" and base.vae.dtype == torch.float32
    encoding = contextlib.nullcontext() if in_parallel else threading.Lock()
    changed: set[str] = set()
    broken: set[str] = set()

    def encode(key: str) -> bool:
        source, variant = wanted.pop(key)
        if store.get(key) is not None:
            return False
        try:
            drawn, mask = apply(variant, *source.load())
        except DataError as error:
            changed.update(error.problems)
            return False
        pixels = to_pixels(drawn)[None]
        with encoding:
            mean, deviation = base.encode_picture(pixels)
        if not (torch.isfinite(mean).all() and torch.isfinite(deviation).all()):
            broken.add(str(source.picture.file))
            return False
        entry = {"mean": mean[0], "deviation": deviation[0]}
        if mask is not None:
            entry["mask"] = _weights(mask, mean.shape[-1], mean.shape[-2])
        store.put(key, entry)
        return True

    base.restore()  # which threads must not do at the same time
    pixels = max((view.crop.size_px[0] * view.crop.size_px[1] for view in views), default=0)
    channels = base.vae.config.block_out_channels[0]
    workers = _workers(pixels * channels * BYTES_PER_CHANNEL if in_parallel else 0, base.device)
    made = _run(list(wanted), encode, workers, in_parallel, on_done)
    problems = sorted(changed)
    if broken:
        problems.append(
            f"The VAE gives values that are not finite numbers for {shown_list(sorted(broken))}, "
            f"in float32 too: it is damaged. Name another with base.vae."
        )
    if problems:
        raise DataError(problems)
    return made


def encode_captions(
    base: BaseModel, texts: Sequence[str], store: Store, max_tokens: int, *, on_done: OnDone
) -> int:
    """Put the embedding of every text into the store; how many it did not have.

    An entry holds 'hidden' (tokens, width), and 'pooled' (width) of SDXL; float32. Each text is
    encoded by itself, as its embedding differs in the last bits beside others.

    Args:
        on_done: as for `encode_views`.

    Raises:
        UserError: the store cannot be written.
    """
    texts = list(dict.fromkeys(texts))
    tokens = base.tokens(texts, max_tokens)
    in_parallel = base.device.type == "cpu"
    encoding = contextlib.nullcontext() if in_parallel else threading.Lock()

    @torch.no_grad()
    def encode(number: int) -> bool:
        key = text_key(texts[number], base, max_tokens)
        if store.get(key) is not None:
            return False
        with encoding:
            found = base.encode_tokens(tokens[number : number + 1])
            entry = {"hidden": found.hidden[0].float().cpu()}
            if found.pooled is not None:
                entry["pooled"] = found.pooled[0].float().cpu()
        store.put(key, entry)
        return True

    base.restore()
    return _run(range(len(texts)), encode, _workers(0, base.device), in_parallel, on_done)


def to_pixels(picture: Image.Image) -> Tensor:
    """(3, height, width), -1 to 1, of an RGB picture: what a VAE reads."""
    values = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))


class _Source:
    """A picture that is read when it is first needed; it goes with what refers to the source."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture
        self._lock = threading.Lock()
        self._loaded: tuple[Image.Image, Image.Image | None] | None = None

    def load(self) -> tuple[Image.Image, Image.Image | None]:
        with self._lock:
            if self._loaded is None:
                self._loaded = load_picture(self.picture)
            return self._loaded


def _wanted(views: Sequence[View], base: BaseModel) -> dict[str, tuple[_Source, Variant]]:
    """Every variant of every view by its key, in the order of the views."""
    sources = {view.picture: _Source(view.picture) for view in views}
    wanted = {}
    for view in views:
        for number in range(variant_count(view.picture.options)):
            variant = choose_variant(view.picture, view.crop, number)
            wanted[_latent_key(view.picture, variant, base)] = sources[view.picture], variant
    return wanted


def _latent_key(picture: Picture, variant: Variant, base: BaseModel) -> str:
    mask = "alpha" if picture.options.masks == "alpha" else picture.mask_sha256
    content = (picture.sha256, mask, picture.options.background, variant)
    return _digest("latents", *content, base.vae_fingerprint())


def _digest(*facts: object) -> str:
    return hashlib.sha256(repr((FORMAT, *facts)).encode()).hexdigest()


def _weights(mask: Image.Image, width: int, height: int) -> Tensor:
    """(1, height, width), 0 to 1: the mean of a mask over each latent's pixels."""
    small = mask.resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]


def _workers(bytes_each: int, device: torch.device) -> int:
    """Threads to work in: one a core, as far as half of the free memory reaches."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if device.type != "cpu":
        return min(cores, MOST_READERS)
    room = psutil.virtual_memory().available // 2
    return max(1, min(cores, room // bytes_each if bytes_each else cores))


def _run(
    jobs: Sequence[Job],
    work: Callable[[Job], bool],
    workers: int,
    in_parallel: bool,
    on_done: OnDone,
) -> int:
    """Work through jobs in threads; how many of them made something.

    Args:
        in_parallel: whether the model runs in all of the threads, each on one core. That keeps
            more cores busy than splitting every operation of a small model, and gives the same
            bits however many threads there are.
    """
    threads = torch.get_num_threads()
    prepare = (lambda: torch.set_num_threads(1)) if in_parallel else None
    pool = ThreadPoolExecutor(workers, "encode", prepare)
    futures = [pool.submit(work, job) for job in jobs]
    try:
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if on_done(done, len(jobs)):
                break
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return sum(future.result() for future in futures if not future.cancelled())
