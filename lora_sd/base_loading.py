"""Load a base model by name, onto a device and in a precision."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from lora_sd.base_files import BaseFiles
from lora_sd.base_files.components import load_parts
from lora_sd.base_files.hub import find_base
from lora_sd.base_files.prediction import find_prediction
from lora_sd.base_files.scheduler import make_scheduler
from lora_sd.base_files.tokenizers import load_tokenizers
from lora_sd.base_model import BaseModel
from lora_sd.errors import BaseModelError, Problems, UserError

MOST_TIMESTEPS = 100_000


def load_base_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    vae: str | None = None,
    prediction_type: str = "auto",
    zero_terminal_snr: str = "auto",
    clip_skip: int = 1,
) -> BaseModel:
    """Load a base model by name and freeze it.

    Args:
        name: 'tiny-sd', a `.safetensors` checkpoint in the original layout, the path of a diffusers
            folder, or a hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'.
        vae: another VAE for it: a `.safetensors` file, or a diffusers folder.
        prediction_type: 'epsilon', 'v_prediction', or 'auto': as the files say.
        zero_terminal_snr: 'yes', 'no', or 'auto': as the files say.
        clip_skip: which of the text encoder's last layers is used, 1 the last.

    Raises:
        BaseModelError: not found, damaged, or not a Stable Diffusion text-to-image model; or the
            settings do not go with it.
    """
    files = find_base(name, half=dtype != torch.float32)
    files.check_configs()
    problems = Problems()
    with problems.gathered():
        _check_clip_skip(files, clip_skip)
    with problems.gathered():
        prediction = find_prediction(files, prediction_type, zero_terminal_snr)
        scheduler = make_scheduler(
            name, files.config("scheduler"), prediction.type, prediction.zero_terminal_snr
        )
    with problems.gathered():
        sources, modules = load_parts(files, device, dtype, vae)
    with problems.gathered():
        tokenizers = load_tokenizers(files)
    try:
        problems.tell()
    except UserError as error:
        raise BaseModelError(error.problems) from None
    _check_numbers(name, modules["vae"].config, scheduler.config)
    return BaseModel(
        name=name,
        scheduler=scheduler,
        clip_skip=clip_skip,
        prediction_type_is_known=prediction.is_known,
        sources=sources,
        **modules,
        **tokenizers,
    )


def pick_device() -> torch.device:
    """The GPU when there is one (CUDA, then Apple's), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of a name, 'auto' decided by the device: bfloat16 or float16 on a GPU."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
            name
        ]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


def _check_clip_skip(files: BaseFiles, clip_skip: int) -> None:
    layers = files.config("text_encoder").get("num_hidden_layers", 12)
    if clip_skip > 1 and files.has_component("text_encoder_2"):
        raise BaseModelError(
            f"base.clip_skip is {clip_skip}, and '{files.name}' is an SDXL model, which always "
            f"uses the layer before the last. Set it to 1."
        )
    if clip_skip > layers:
        raise BaseModelError(
            f"base.clip_skip is {clip_skip}, and the text encoder of '{files.name}' has {layers} "
            f"layers."
        )


def _check_numbers(name: str, vae: Mapping[str, Any], schedule: Mapping[str, Any]) -> None:
    """Refuses configs whose numbers would give wrong latents or no noise schedule."""
    scaling, shift = vae.get("scaling_factor"), vae.get("shift_factor")
    is_number = isinstance(scaling, int | float) and math.isfinite(scaling) and scaling > 0
    if not is_number or not isinstance(shift or 0.0, int | float):
        raise BaseModelError(
            f"The VAE of '{name}' has a damaged config: scaling_factor is {scaling!r}, "
            f"shift_factor {shift!r}."
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise BaseModelError(
            f"The VAE of '{name}' scales each channel by itself (latents_mean, latents_std), which "
            f"is not supported."
        )
    timesteps = schedule.get("num_train_timesteps")
    if not isinstance(timesteps, int) or not 10 <= timesteps <= MOST_TIMESTEPS:
        raise BaseModelError(
            f"The scheduler of '{name}' has a damaged config: num_train_timesteps is {timesteps!r}."
        )
