"""Load Stable Diffusion into its parts: the embedded base, a diffusers folder, or a hub id."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from lora_sd import layer_names
from lora_sd.errors import BaseModelError, ConfigError, shown_list
from lora_sd.formats import versions
from lora_sd.formats.layer_tables import EMBEDDED, family_of

PREDICTION_TYPES = ("epsilon", "v_prediction")


@dataclass
class BaseModel:
    """The parts of a Stable Diffusion 1.x or 2.x model, frozen and in evaluation mode.

    `name` is what the user called it. `scheduler` is the one its makers ship, for generation.
    """

    name: str
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def components(self) -> dict[str, torch.nn.Module]:
        """The parts that adapters adapt, by the name that begins their layers' names."""
        return {"unet": self.unet, "text_encoder": self.text_encoder}

    @property
    def family(self) -> str:
        """'tiny-sd', 'sd15', 'sd21', 'sdxl', or '' for a model whose layers no client knows."""
        return family_of(layer_names.layer_shapes({"unet": self.unet}))

    def tokens(self, text: str) -> torch.Tensor:
        """Token ids of a text (tokens,), padded and cut to the tokenizer's length."""
        ids: torch.Tensor = self.tokenizer(
            text,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids[0]
        return ids

    def eval(self) -> None:
        """Leave training: no dropout anywhere."""
        for part in self.components.values():
            part.eval()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
        self.text_encoder.activation_checkpointing_enable({"use_reentrant": False})

    @property
    def prediction_type(self) -> str:
        """'epsilon' or 'v_prediction': what the UNet was trained to predict."""
        return str(self.scheduler.config.prediction_type)

    @property
    def resolution_px(self) -> int:
        """The side of the pictures that the model was made for, in pixels."""
        return int(self.unet.config.sample_size * self.vae_factor)

    @property
    def vae_factor(self) -> int:
        """Pixels on the side of one latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def check_size(self, side_px: int) -> None:
        """Raises ConfigError when pictures of that side do not fit the UNet's halvings."""
        multiple = self.vae_factor * int(2 ** (len(self.unet.config.block_out_channels) - 1))
        if side_px % multiple:
            raise ConfigError(
                f"'data.resolution_px' is {side_px}; '{self.name}' wants a multiple of {multiple}."
            )

    @property
    def kohya_version(self) -> str:
        """What kohya's `ss_base_model_version` says: 'sd_v1', 'sd_v2', 'sd_v2_v', or the name of
        a model that is none of these."""
        return versions.kohya_version(self.family, self.prediction_type) or Path(self.name).name

    def fingerprint(self) -> str:
        """Changes with the base's weights: a hash over the start of every tensor it trains on."""
        digest = hashlib.sha256()
        for part in (self.unet, self.text_encoder, self.vae):
            for name, tensor in part.state_dict().items():
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.flatten()[:16].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def noise_schedule(self) -> DDPMScheduler:
        """The training schedule: adds noise and knows each timestep's signal-to-noise ratio."""
        return DDPMScheduler.from_config(self.scheduler.config)

    def pipeline(self) -> StableDiffusionPipeline:
        """diffusers' pipeline over these same parts, nothing copied."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


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


def load_base_model(name: str, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Load a base model by name and freeze it.

    Args:
        name: 'tiny-sd', the path of a diffusers folder, or a hub id such as
            'stable-diffusion-v1-5/stable-diffusion-v1-5'.

    Raises:
        BaseModelError: not found, damaged, or not a Stable Diffusion 1.x or 2.x text-to-image
            model.
    """
    source = EMBEDDED.get(name, Path(name))
    local = os.path.isdir(source)
    if local and not (source / "model_index.json").is_file():
        raise BaseModelError(
            f"'{name}' is not a diffusers folder: it holds no model_index.json. Name the folder "
            f"that does, or use 'tiny-sd'."
        )
    if os.path.isfile(source):
        raise BaseModelError(
            f"'{name}' is a single file, which can be baked into but not trained on yet. Name a "
            f"diffusers folder, or use 'tiny-sd'."
        )
    if not local and (
        os.path.exists(source) or name.count("/") != 1 or name.startswith((".", "/", "~"))
    ):
        raise BaseModelError(
            f"There is no base model '{name}': it is no diffusers folder and no hub id. Known "
            f"names: {', '.join(EMBEDDED)}."
        )
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        # Loaded by itself, because a pipeline fills in missing weights with random numbers.
        text_encoder, info = CLIPTextModel.from_pretrained(
            str(source) if local else name,
            subfolder="text_encoder",
            dtype=dtype,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
        )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise ValueError(
                f"its text encoder lacks {len(missing)} weights, such as {shown_list(missing, 1)}"
            )
        pipeline = StableDiffusionPipeline.from_pretrained(
            str(source) if local else name,
            text_encoder=text_encoder,
            dtype=dtype,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            use_safetensors=True,
            local_files_only=local,
        )
    except (
        OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError,
        HFValidationError, SafetensorError,
    ) as error:  # fmt: skip
        reason = str(error).strip().split("\n")[0]
        raise BaseModelError(f"The base model '{name}' cannot be loaded: {reason}") from error
    base = BaseModel(
        name=name,
        unet=pipeline.unet,
        text_encoder=pipeline.text_encoder,
        vae=pipeline.vae,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
    )
    _check(base)
    for part in (base.unet, base.text_encoder, base.vae):
        part.requires_grad_(False).eval().to(device)
    return base


def _check(base: BaseModel) -> None:
    parts = {"UNet": base.unet, "text encoder": base.text_encoder, "VAE": base.vae}
    for part, model in parts.items():
        if any(parameter.is_meta for parameter in model.parameters()):
            raise BaseModelError(f"The base model '{base.name}' lacks weights of its {part}.")
    if not 1 < base.tokenizer.model_max_length < 10_000 or not len(base.tokenizer):
        raise BaseModelError(f"The base model '{base.name}' lacks its tokenizer.")
    channels, latents = base.unet.config.in_channels, base.vae.config.latent_channels
    if channels != latents:
        raise BaseModelError(
            f"'{base.name}' is not a text-to-image model: its UNet takes {channels} channels and "
            f"its latents have {latents} (9 means inpainting)."
        )
    if base.prediction_type not in PREDICTION_TYPES:
        raise BaseModelError(
            f"'{base.name}' predicts '{base.prediction_type}'; only "
            f"{' and '.join(PREDICTION_TYPES)} can be trained."
        )
