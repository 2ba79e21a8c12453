"""Encode every picture and caption once, so that neither VAE nor text encoder runs in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_sd.base_model import BaseModel
from lora_sd.data.folder import Example
from lora_sd.errors import DataError, shown_list


@dataclass(frozen=True)
class Cache:
    """What training reads, on the CPU in float32.

    `mean` and `deviation` (n, channels, height, width) are the VAE's posterior, scaled; a latent
    is mean + deviation * noise, drawn anew each time a picture is seen. `captions` (n, tokens,
    width) are the text encoder's outputs, `empty` (tokens, width) is that of the empty caption;
    where the text encoder learns, they are its inputs: token ids (n, tokens) and (tokens).
    """

    mean: Tensor
    deviation: Tensor
    captions: Tensor
    empty: Tensor

    def __len__(self) -> int:
        return self.mean.shape[0]

    def latents(self, index: int, noise: Tensor) -> Tensor:
        """A latent of picture `index`, drawn with `noise` of one latent's shape."""
        return self.mean[index] + self.deviation[index] * noise


@torch.no_grad()
def encode(
    base: BaseModel,
    examples: Sequence[Example],
    on_image: Callable[[int], bool],
    as_tokens: bool = False,
) -> tuple[Cache, list[str]]:
    """(cache, notices) of a folder's examples.

    Args:
        on_image: called with the number of pictures encoded so far; encoding stops there when it
            returns True, and the cache holds only these.
        as_tokens: keep the captions' token ids instead of the text encoder's outputs.

    Raises:
        DataError: a picture whose latents are not finite numbers; named.
    """
    vae, pipeline = base.vae, base.pipeline()
    means, deviations, broken = [], [], []
    for number, example in enumerate(examples, start=1):
        pixels = pipeline.image_processor.preprocess(example.picture())
        posterior = vae.encode(pixels.to(base.device, vae.dtype)).latent_dist
        mean = (
            posterior.mean.float() - (vae.config.shift_factor or 0.0)
        ) * vae.config.scaling_factor
        if not torch.isfinite(mean).all():
            broken.append(example.file.name)
        means.append(mean.cpu())
        deviations.append((posterior.std.float() * vae.config.scaling_factor).cpu())
        if on_image(number):
            break
    if broken:
        raise DataError(
            f"The VAE gives values that are not finite for {shown_list(broken)}: set base.dtype to "
            f"bfloat16 or float32."
        )
    texts = list(dict.fromkeys([example.caption for example in examples] + [""]))
    if as_tokens:
        outputs = {text: base.tokens([text])[0, 0, 0] for text in texts}
    else:
        outputs = {
            text: pipeline.encode_prompt(text, base.device, 1, False)[0][0].float().cpu()
            for text in texts
        }
    longest = base.tokenizer.model_max_length
    cut = [text for text in texts if len(base.tokenizer(text).input_ids) > longest]
    notices = []
    if cut:
        notices.append(
            f"{len(cut)} captions are longer than {longest - 2} tokens and lose their end, such as "
            f"'{cut[0][:60]}...'."
        )
    captions = torch.stack([outputs[example.caption] for example in examples])
    return Cache(torch.cat(means), torch.cat(deviations), captions, outputs[""]), notices
