"""What a step of training sees: batches of encoded pictures with their noise, texts and weights.

What is drawn at random for a showing of a picture depends on the seed, on which picture it is and
on how often it was shown before, alone: neither batches, accumulation, processes nor where an
interrupted run goes on change what is seen.
"""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_sd.base_model import BaseModel, TextEmbedding
from lora_sd.data.augment import drawn_crop, variant_count
from lora_sd.data.buckets import time_ids
from lora_sd.data.cache import encode_captions, encode_views, latent_key, text_key
from lora_sd.data.captions import draw_caption, plain_caption, varies
from lora_sd.data.findings import counted
from lora_sd.data.order import Order, Seen
from lora_sd.data.store import Store
from lora_sd.data.views import View
from lora_sd.errors import DataError
from lora_sd.objective import Objective
from lora_sd.randomness import generator, seed_at

log = logging.getLogger("lora_sd")
VALIDATION_TIMES = 4


@dataclass(frozen=True)
class Batch:
    """Pictures of one size (n of them), on the CPU.

    Attributes:
        latents: (n, channels, height, width).
        noise, added_noise: the same shape: what the target is made of, and what is added; they
            differ where the input is perturbed.
        timesteps: (n).
        names: of the pictures.
        captions: the texts.
        text: their embeddings; None where the text encoder learns or texts are drawn each time.
        time_ids: (n, 6), SDXL's original size, crop and target size.
        mask: (n, 1, height, width) weights of the loss, or None where all count.
        weights: (n) what each picture's loss counts; over all batches of a step and all processes
            they add up to 1 where every folder's loss weight is 1.
    """

    latents: Tensor
    noise: Tensor
    added_noise: Tensor
    timesteps: Tensor
    names: list[str]
    captions: list[str]
    text: TextEmbedding | None
    time_ids: Tensor
    mask: Tensor | None
    weights: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same with its tensors on a device."""
        moved = {
            name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")
        }
        return replace(self, **moved)


class TrainingData:
    """The views of a run, to be encoded by `cache` and then read step by step.

    Args:
        views: every picture at every resolution.
        seed: the run's.
        step_pictures: pictures in a step, of all processes and passes together.
        learns_text: whether the text encoder is trained, so that texts are not encoded once.
    """

    def __init__(
        self,
        base: BaseModel,
        views: Sequence[View],
        store: Store,
        objective: Objective,
        *,
        seed: int,
        step_pictures: int,
        max_tokens: int = 75,
        learns_text: bool = False,
    ) -> None:
        self._base, self._store, self._objective = base, store, objective
        self._seed, self._max_tokens, self._learns_text = seed, max_tokens, learns_text
        self.shown = [view for view in views if view.picture.options.kind != "validation"]
        self.held_out = [view for view in views if view.picture.options.kind == "validation"]
        self.texts_vary = learns_text or any(
            varies(view.picture.caption, view.picture.options) for view in self.shown
        )
        self.order = Order(
            [view.crop.size_px for view in self.shown],
            [view.picture.repeats for view in self.shown],
            [view.picture.options.kind == "regularisation" for view in self.shown],
            step_pictures,
            seed,
        )
        self._step_pictures = step_pictures

    def texts(self) -> list[str]:
        """Every text that can be encoded before training, the empty one among them."""
        if self._learns_text:
            return [""]
        views = self.held_out if self.texts_vary else [*self.shown, *self.held_out]
        return list(dict.fromkeys([*map(_plain, views), ""]))

    def first_epoch(self) -> Counter[tuple[int, int]]:
        """How many pictures of each size (width, height) the first epoch shows; it shows none
        where repeats are small."""
        steps = -(-self.order.epoch_size(0) // self._step_pictures)
        return Counter(
            self.shown[seen.item].crop.size_px
            for step in range(steps)
            for seen in self.order.step(step)
            if seen.epoch == 0
        )

    def encode(self, on_done: Callable[[int, int], bool]) -> list[str]:
        """Encode what the store lacks; sentences on what is cut off, or was damaged.

        Args:
            on_done: called with (done, of); encoding stops there when it returns True.

        Raises:
            DataError: the VAE gives no finite numbers for some pictures, which are named.
        """
        damaged = self._store.damaged
        encode_views(self._base, [*self.shown, *self.held_out], self._store, on_done=on_done)
        texts = self.texts()
        encode_captions(self._base, texts, self._store, self._max_tokens, on_done=on_done)
        said = self._cut_captions()
        if count := self._store.damaged - damaged:
            said.append(f"Damaged entries of the cache that have been made again: {count}.")
        return said

    def _cut_captions(self) -> list[str]:
        """A sentence on the captions of which not all is read."""
        texts = list(dict.fromkeys(map(_plain, [*self.shown, *self.held_out])))
        counts = zip(texts, self._base.token_counts(texts), strict=True)
        cut = [text for text, tokens in counts if tokens > self._max_tokens]
        if not cut:
            return []
        return [
            f"{counted(len(cut), 'caption')} of more than {self._max_tokens} tokens, the ends "
            f"of which are not read, such as '{cut[0][:60]}...': see data.max_tokens."
        ]

    def release(self) -> None:
        """Let the VAE, and the text encoders where all texts are encoded, leave memory."""
        encoders = [name for name in self._base.components if name != "unet"]
        self._base.release("vae", *([] if self.texts_vary else encoders))

    def batches(self, step: int, batch_size: int, world: int = 1, rank: int = 0) -> list[Batch]:
        """What one process works through in a step; all processes have as many batches.

        Args:
            batch_size: most pictures of a batch.
            world, rank: how many processes there are, and which this is.
        """
        by_size: dict[tuple[int, int], list[Seen]] = {}
        for seen in self.order.step(step):
            by_size.setdefault(self.shown[seen.item].crop.size_px, []).append(seen)
        batches = []
        for alike in by_size.values():
            for start in range(0, len(alike), batch_size * world):
                together = alike[start : start + batch_size * world]
                # A process without a picture of its own works through another's, for nothing.
                own = together[rank::world]
                batches.append(self._batch(own or together[:1], is_filler=not own))
        return batches

    def _batch(self, seen: Sequence[Seen], is_filler: bool) -> Batch:
        return self._stack([self._show(one) for one in seen], 0.0 if is_filler else 1.0)

    def _show(self, seen: Seen) -> "_Shown":
        """One showing of a picture, and all that is drawn for it."""
        view = self.shown[seen.item]
        options = view.picture.options
        draw = generator(self._seed, "picture", seen.item, seen.count)
        timestep = self._objective.draw_timestep(draw)
        dropped = float(torch.rand((), generator=draw)) < options.caption_dropout
        text = ""
        if not dropped:
            words = random.Random(seed_at(self._seed, "caption", seen.item, seen.count))
            text = draw_caption(view.picture.caption, options, words)
        variant = seen.count % variant_count(options)
        return self._shown(view, variant, timestep, text, draw, self._objective)

    def _shown(
        self,
        view: View,
        variant: int,
        timestep: int,
        text: str,
        draw: torch.Generator,
        objective: Objective,
    ) -> "_Shown":
        entry = self._read(latent_key(view, variant, self._base), view.picture.name)
        shape = entry["mean"].shape
        latents = entry["mean"] + entry["deviation"] * torch.randn(shape, generator=draw)
        noise, added_noise = objective.draw_noise(shape, draw)
        options, mask = view.picture.options, entry.get("mask")
        if mask is not None:
            mask = mask + (1 - mask) * options.unmasked_weight
        ids = time_ids(view.picture.size_px, drawn_crop(view.picture, view.crop, variant))
        return _Shown(
            view.picture.name, latents, noise, added_noise, timestep, text, ids, mask,
            options.loss_weight,
        )  # fmt: skip

    def _stack(self, shown: Sequence["_Shown"], share: float) -> Batch:
        texts = [one.text for one in shown]
        masks = None
        if any(one.mask is not None for one in shown):
            all_ones = torch.ones(1, *shown[0].latents.shape[1:])
            masks = torch.stack([all_ones if one.mask is None else one.mask for one in shown])
        return Batch(
            torch.stack([one.latents for one in shown]),
            torch.stack([one.noise for one in shown]),
            torch.stack([one.added_noise for one in shown]),
            torch.tensor([one.timestep for one in shown]),
            [one.name for one in shown],
            texts,
            None if self.texts_vary else self.embeddings(texts),
            torch.tensor([one.time_ids for one in shown]),
            masks,
            torch.tensor([one.weight for one in shown]) * (share / self._step_pictures),
        )

    def embeddings(self, texts: Sequence[str]) -> TextEmbedding:
        """The encoded texts of `texts()`."""
        entries = [
            self._read(text_key(text, self._base, self._max_tokens), f"the caption '{text[:40]}'")
            for text in texts
        ]
        pooled = [entry["pooled"] for entry in entries if "pooled" in entry]
        return TextEmbedding(
            torch.stack([entry["hidden"] for entry in entries]),
            torch.stack(pooled) if pooled else None,
        )

    def held_out_batches(self, batch_size: int) -> Iterator[tuple[list[int], Batch]]:
        """The validation pictures, each at fixed timesteps with fixed noise.

        Args:
            batch_size: most samples of a batch.

        Yields:
            (where each sample belongs among all: view * VALIDATION_TIMES + time, the batch).
        """
        places: dict[tuple[int, int], list[int]] = {}
        for number, view in enumerate(self.held_out):
            own = range(number * VALIDATION_TIMES, (number + 1) * VALIDATION_TIMES)
            places.setdefault(view.crop.size_px, []).extend(own)
        for alike in places.values():
            for start in range(0, len(alike), batch_size):
                some = alike[start : start + batch_size]
                batch = self._stack([self._held_out(place) for place in some], 1.0)
                if not self._learns_text:
                    batch = replace(batch, text=self.embeddings(batch.captions))
                yield some, batch

    def _held_out(self, place: int) -> "_Shown":
        """A validation picture at one of its timesteps."""
        number, k = divmod(place, VALIDATION_TIMES)
        view, plain = self.held_out[number], Objective(self._objective.schedule)
        draw = generator(self._seed, "validation", number, k)
        timestep = (2 * k + 1) * plain.schedule.config.num_train_timesteps // (2 * VALIDATION_TIMES)
        return self._shown(view, 0, timestep, _plain(view), draw, plain)

    def _read(self, key: str, what: str) -> dict[str, Tensor]:
        entry = self._store.get(key)
        if entry is None:  # the cache may be deleted at any time
            log.warning("Note: the cache has lost %s, and is filled again.", what)
            self.encode(lambda done, of: False)
            self.release()
            entry = self._store.get(key)
        if entry is None:
            raise DataError(f"The cache has lost {what}, and does not keep it. Start again.")
        return entry


def _plain(view: View) -> str:
    """The caption of a view as it is when nothing is drawn at random."""
    return plain_caption(view.picture.caption, view.picture.options)


@dataclass(frozen=True)
class _Shown:
    """One picture as it is shown once."""

    name: str
    latents: Tensor
    noise: Tensor
    added_noise: Tensor
    timestep: int
    text: str
    time_ids: tuple[int, ...]
    mask: Tensor | None
    weight: float
