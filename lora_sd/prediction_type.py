"""Whether a base model predicts what it is said to, by its own loss on the user's pictures.

What the UNet gives is compared with the noise and with the velocity, at timesteps where these are
far apart (at low ones, v is nearly the noise) and where the picture is still to be seen. Each loss
is set in relation to that of predicting nothing, which is 1. Measured on eight pictures:

| model and pictures | under epsilon | under v |
| --- | --- | --- |
| tiny-sd (v-prediction), flat icons, which it knows | 2.00 | 0.01 |
| ink drawings, a style that it never saw, sets of eight | 1.56 to 1.94 | 0.69 to 0.92 |
| ink drawings at twice the size that it was made for | 1.43 to 1.49 | 0.84 to 0.94 |
| tiny-sd, its velocity turned into the noise that it means, ink drawings | 0.03 | 1.76 |

So a run is stopped where what was said scores above 1.3 and the other below 0.95. Untrained
networks with usual starts were never stopped; of six with all weights at deviation 0.2 one was.
Pictures of nearly one colour are left out: they say nothing (a flat grey scored 0.95 and 1.87).
"""

import math

import torch
from torch import Tensor

from lora_sd.base_model import BaseModel
from lora_sd.errors import BaseModelError
from lora_sd.randomness import generator
from lora_sd.text_encoding import TextEmbedding

TIMESTEPS = (0.5, 0.6, 0.7)  # of all
FLAT = 0.1  # variance over the latent's places; the ink drawings have 0.57 or more, one colour 0.01
SEED = 0
CLEARLY_RIGHT, CLEARLY_WRONG = 0.95, 1.3


@torch.no_grad()
def measured_losses(
    base: BaseModel, latents: Tensor, text: TextEmbedding, time_ids: Tensor | None
) -> dict[str, float]:
    """The loss under 'epsilon' and 'v_prediction', relative to that of predicting nothing (1).

    Args:
        latents: (pictures, channels, height, width), scaled.
        text: the embeddings of their captions.
        time_ids: (pictures, 6), for SDXL.
    """
    schedule = base.noise_schedule()
    latents = latents.to(base.device, torch.float32)
    errors: dict[str, list[Tensor]] = {"epsilon": [], "v_prediction": []}
    for timestep in (int(share * schedule.config.num_train_timesteps) for share in TIMESTEPS):
        noise = torch.randn(latents.shape, generator=generator(SEED, "prediction", timestep))
        noise = noise.to(base.device)
        timesteps = torch.full((len(latents),), timestep, device=base.device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        predicted = base.predict(noisy, timesteps, text, time_ids).float()
        targets = {
            "epsilon": noise,
            "v_prediction": schedule.get_velocity(latents, noise, timesteps),
        }
        for name, target in targets.items():
            errors[name].append((predicted - target).square().mean() / target.square().mean())
    return {name: float(torch.stack(some).mean()) for name, some in errors.items()}


def check(
    base: BaseModel, latents: Tensor, text: TextEmbedding, time_ids: Tensor | None
) -> list[str]:
    """Notices; where neither settings nor files say what the base predicts, it is set to what fits.

    Args:
        latents, text, time_ids: as of `measured_losses`; a few pictures are enough.

    Raises:
        BaseModelError: what was said is contradicted.
    """
    tells = latents.var((2, 3), correction=0).mean(1) >= FLAT
    if not tells.any():
        return [] if base.prediction_type_is_known else [_assumed(base, "its pictures, all flat,")]
    pooled = None if text.pooled is None else text.pooled[tells]
    text = TextEmbedding(text.hidden[tells], pooled)
    ids = None if time_ids is None else time_ids[tells]
    losses = measured_losses(base, latents[tells], text, ids)
    if not all(map(math.isfinite, losses.values())):
        raise BaseModelError(
            f"'{base.name}' gives values that are not finite numbers for the pictures: it is "
            f"damaged, or base.dtype is too narrow for it."
        )
    said = base.prediction_type
    other = next(name for name in losses if name != said)
    figures = ", ".join(f"{value:.2f} under {name}" for name, value in losses.items())
    is_other = losses[other] < CLEARLY_RIGHT and losses[said] > CLEARLY_WRONG
    if base.prediction_type_is_known and is_other:
        raise BaseModelError(
            f"'{base.name}' is said to predict '{said}', and its loss on the pictures says "
            f"otherwise: {figures} (1 is what predicting nothing gives). Set base.prediction_type "
            f"to {other}."
        )
    if base.prediction_type_is_known:
        return [f"The base's loss on the pictures, predicting '{said}': {figures}."]
    base.set_prediction_type(other if is_other else said)
    if min(losses.values()) < CLEARLY_RIGHT:
        return [
            f"The base's files do not say what it predicts; its loss on the pictures says "
            f"'{base.prediction_type}': {figures}."
        ]
    return [_assumed(base, f"its loss on the pictures ({figures})")]


def _assumed(base: BaseModel, besides: str) -> str:
    return (
        f"Neither the base's files nor {besides} tell what it predicts; '{base.prediction_type}' "
        f"is assumed. Set base.prediction_type if it is something else."
    )
