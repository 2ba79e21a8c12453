"""What the passes of a run take beyond what is loaded, computed from shapes alone.

The pass itself is done, forward, backward and with gradient checkpointing, on tensors without
numbers, and what is alive at each moment is counted. What kernels take for themselves is not in
it: cuDNN's workspaces, oneDNN's reordered copies.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_sd.plan.live_memory import LiveMemory
from lora_sd.plan.shaped_base import Arithmetic, ShapedBase
from lora_sd.text_encoding import CHUNK_TOKENS, TextEmbedding

TIME_IDS = 6


@dataclass(frozen=True)
class Work:
    """Bytes that a pass takes at its highest, beyond what is loaded and beyond gradients that were
    there before; `gradients` are those of them that are gradients of what learns."""

    highest: int
    gradients: int = 0


def training_pass(
    base: ShapedBase,
    arithmetic: Arithmetic,
    size_px: tuple[int, int],
    batch_size: int,
    *,
    text: str,
    max_tokens: int,
    adds_up: bool,
) -> Work:
    """One forward and backward pass, of a base whose adapters are attached.

    Args:
        size_px: (width, height).
        text: as of `Setting`.
        adds_up: whether gradients of an earlier pass are there already.
    """
    base.unet.train()
    for encoder in base.text_encoders:
        encoder.train(text == "trained")
    learning = [one for one in base.tensors() if one.requires_grad]
    given = [torch.empty_like(one) for one in learning] if adds_up else []
    for parameter, gradient in zip(learning, given, strict=False):
        parameter.grad = gradient
    with _counted(base, given) as live:

        def count(parameter: Tensor) -> None:
            if not adds_up and parameter.grad is not None:
                live.set_apart += parameter.grad.untyped_storage().nbytes()

        hooks = [one.register_post_accumulate_grad_hook(count) for one in learning]
        latents, times, time_ids = _latents(base, size_px, batch_size)
        noise, weights = torch.empty_like(latents), torch.empty(batch_size)
        with arithmetic.again():
            if text == "cached":
                texts = _embeddings(base, batch_size, max_tokens)
            else:
                texts = base.encode_tokens(_tokens(base, batch_size, max_tokens))
            predicted = base.predict(latents + noise, times, texts, time_ids)
            errors = F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)
            loss = (errors * weights).sum()
        loss.backward()
        for hook in hooks:
            hook.remove()
    for parameter in learning:
        parameter.grad = None
    return Work(live.peak, live.set_apart_at_peak)


@torch.no_grad()
def encoding(base: ShapedBase, size_px: tuple[int, int]) -> Work:
    """One picture (width, height) through the VAE's encoder."""
    with _counted(base) as live, Arithmetic(None, False):
        pixels = torch.empty(1, 3, size_px[1], size_px[0])
        base.vae.encode(pixels.to(base.vae.dtype)).latent_dist.parameters.float()
    return Work(live.peak)


@torch.no_grad()
def decoding(base: ShapedBase, size_px: tuple[int, int], pictures: int) -> Work:
    """Pictures (width, height) out of the VAE's decoder."""
    with _counted(base) as live, Arithmetic(None, False):
        latents = _latents(base, size_px, pictures)[0]
        base.vae.decode(latents.to(base.vae.dtype)).sample.float()
    return Work(live.peak)


@torch.no_grad()
def denoising(
    base: ShapedBase,
    arithmetic: Arithmetic,
    size_px: tuple[int, int],
    pictures: int,
    *,
    max_tokens: int,
) -> Work:
    """One step of drawing pictures, each with and without its prompt."""
    base.eval()
    with _counted(base) as live, arithmetic.again():
        latents, times, time_ids = _latents(base, size_px, 2 * pictures)
        base.predict(latents, times, _embeddings(base, 2 * pictures, max_tokens), time_ids)
    return Work(live.peak)


@contextlib.contextmanager
def _counted(base: ShapedBase, also_known: list[Tensor] | None = None) -> Iterator[LiveMemory]:
    """What is made inside is made of shapes alone, and counted."""
    known = [*base.tensors(), *(also_known or [])]
    with torch.device("meta"), LiveMemory(known) as live:
        yield live


def _latents(
    base: ShapedBase, size_px: tuple[int, int], pictures: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(latents, timesteps, time ids) of pictures (width, height)."""
    width, height = (side // base.vae_factor for side in size_px)
    latents = torch.empty(pictures, base.unet.config.in_channels, height, width)
    return latents, torch.empty(pictures, dtype=torch.int64), torch.empty(pictures, TIME_IDS)


def _chunks(max_tokens: int) -> int:
    return -(-max_tokens // CHUNK_TOKENS)


def _length(base: ShapedBase) -> int:
    """Tokens of a chunk, with start and end."""
    return min(int(base.text_encoder.config.max_position_embeddings), CHUNK_TOKENS + 2)


def _embeddings(base: ShapedBase, texts: int, max_tokens: int) -> TextEmbedding:
    length = _chunks(max_tokens) * _length(base)
    hidden = torch.empty(texts, length, base.unet.config.cross_attention_dim)
    second = base.text_encoder_2
    pooled = None if second is None else torch.empty(texts, second.config.projection_dim)
    return TextEmbedding(hidden, pooled)


def _tokens(base: ShapedBase, texts: int, max_tokens: int) -> Tensor:
    shape = texts, len(base.text_encoders), _chunks(max_tokens), _length(base)
    return torch.empty(shape, dtype=torch.int64)
