"""A base model in use: loaded, encoding captions and pictures, predicting, and let go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_sd import layer_names
from lora_sd.base_files.components import Part
from lora_sd.base_files.digests import config_text, joined_digest, weights_digest
from lora_sd.base_files.scheduler import make_scheduler
from lora_sd.errors import BaseModelError
from lora_sd.formats import versions
from lora_sd.formats.layer_tables import family_of
from lora_sd.known_bases import size_step_px
from lora_sd.memory.idle_parts import IdleParts
from lora_sd.text_encoding import CHUNK_TOKENS, TextEmbedding, chunked, hidden_states, token_ids

TEXT_LAYER_OF_SDXL = -2


@dataclass(repr=False)
class BaseModel:
    """The parts of a Stable Diffusion 1.x, 2.x or XL model, frozen and in evaluation mode.

    Attributes:
        name: what the user called it.
        scheduler: for generation; the one its makers ship, set to the prediction type.
        text_encoder_2, tokenizer_2: SDXL's second ones.
        clip_skip: which of the text encoder's last layers is used, 1 the last. Not for SDXL.
        prediction_type_is_known: False where neither the user nor the files say it.
        sources: where each part was loaded from.
    """

    name: str
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    scheduler: SchedulerMixin
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    clip_skip: int = 1
    prediction_type_is_known: bool = True
    sources: dict[str, Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = self.unet.device
        parts = {**self.components, "vae": self.vae}
        # Now, as adapters change weights later, and parts are let go. What is cached goes by those
        # of the VAE and the text encoders, so that they are whole: 1.6 s for SDXL in bfloat16.
        weights = {
            part: weights_digest(module, stride=part == "unet") for part, module in parts.items()
        }
        self.idle = IdleParts(parts, self.sources, weights, self.device)
        digests = {
            part: joined_digest(
                weights[part],
                config_text(module),
                self.sources[part].dtype if part in self.sources else module.dtype,
            )
            for part, module in parts.items()
        }
        encoders = [digest for part, digest in digests.items() if part.startswith("text")]
        tokens = [(one.backend_tokenizer.to_str(), one.pad_token_id) for one in self.tokenizers]
        self._fingerprints = {
            "unet": digests["unet"],
            "vae": digests["vae"],
            "text": joined_digest(*encoders, *tokens, self.clip_skip),
        }

    # --- what it is ---

    @property
    def components(self) -> dict[str, nn.Module]:
        """The parts that adapters adapt, by the name that begins their layers' names."""
        parts: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.text_encoder}
        if self.text_encoder_2 is not None:
            parts["text_encoder_2"] = self.text_encoder_2
        return parts

    @property
    def text_encoders(self) -> list[nn.Module]:
        """One, or SDXL's two."""
        return [module for part, module in self.components.items() if part != "unet"]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """One for each text encoder."""
        return [self.tokenizer, *([self.tokenizer_2] if self.tokenizer_2 is not None else [])]

    @property
    def has_pooled(self) -> bool:
        """Whether the UNet wants a pooled text embedding and the picture's size, as SDXL's does."""
        return self.text_encoder_2 is not None

    @property
    def family(self) -> str:
        """'tiny-sd', 'sd15', 'sd21', 'sdxl', or '' for a model whose layers no client knows."""
        return family_of(layer_names.layer_shapes({"unet": self.unet}))

    @property
    def prediction_type(self) -> str:
        """'epsilon' or 'v_prediction': what the UNet was trained to predict."""
        return str(self.scheduler.config.prediction_type)

    def set_prediction_type(self, prediction_type: str) -> None:
        """Take it for 'epsilon' or 'v_prediction' from now on."""
        self.scheduler = make_scheduler(
            self.name, self.scheduler.config, prediction_type, self.zero_terminal_snr
        )
        self.prediction_type_is_known = True

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether its last timestep is pure noise."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr"))

    @property
    def resolution_px(self) -> int:
        """The side of the pictures that the model was made for, in pixels. A single file of SD 2
        does not say it: its v-prediction models were made for 768, the others for 512."""
        files = self.sources["unet"].files
        if files.family == "sd21" and not files.has_configs:
            return 768 if self.prediction_type == "v_prediction" else 512
        return int(self.unet.config.sample_size * self.vae_factor)

    @property
    def vae_factor(self) -> int:
        """Pixels on the side of one latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size_step_px(self) -> int:
        """What the sides of pictures must be multiples of, so that the UNet can halve them."""
        return size_step_px(self.unet.config, self.vae.config)

    @property
    def kohya_version(self) -> str:
        """What kohya's `ss_base_model_version` says: 'sd_v1', 'sd_v2', 'sd_v2_v', or the name of
        a model that is none of these."""
        return versions.kohya_version(self.family, self.prediction_type) or Path(self.name).name

    def fingerprint(self) -> str:
        """Changes with the weights and configs it was loaded with, and with its noise schedule: a
        hash over all but the UNet's weights, of which every tensor is seen in part."""
        return joined_digest(*self._fingerprints.values(), config_text(self.scheduler))

    def vae_fingerprint(self) -> str:
        """Changes with all that encoded pictures depend on, but for the pictures."""
        if self.vae.use_tiling:  # blends the tiles' edges
            tiles = self.vae.tile_sample_min_size, self.vae.tile_overlap_factor
            return joined_digest(self._fingerprints["vae"], tiles)
        return self._fingerprints["vae"]

    def text_fingerprint(self) -> str:
        """Changes with all that encoded captions depend on, but for the captions."""
        return self._fingerprints["text"]

    # --- captions ---

    @property
    def _chunk_length(self) -> int:
        """Tokens that a text encoder reads at once, with start and end."""
        places = self.text_encoder.config.max_position_embeddings
        return min(places, self.tokenizer.model_max_length)

    def tokens(self, texts: Sequence[str], max_tokens: int = CHUNK_TOKENS) -> Tensor:
        """Token ids of texts (texts, encoders, chunks, 77), on the CPU.

        Args:
            max_tokens: what is longer is cut; there are as many chunks as it takes, for any text.
        """
        chunks = -(-max_tokens // CHUNK_TOKENS)
        length = self._chunk_length
        return torch.stack([chunked(one, texts, length, chunks) for one in self.tokenizers], 1)

    def max_tokens_for(self, texts: Sequence[str]) -> int:
        """The `max_tokens` with which none of the texts is cut."""
        longest = max(self.token_counts(texts), default=0)
        return CHUNK_TOKENS * max(1, -(-longest // (self._chunk_length - 2)))

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has, start and end not counted."""
        return [len(ids) for ids in token_ids(self.tokenizer, texts)]

    def encode_tokens(
        self, tokens: Tensor, encoders: Sequence[nn.Module] | None = None
    ) -> TextEmbedding:
        """Encode the tokens of texts, as `tokens` gives them; with gradient where it is enabled.

        Args:
            encoders: stand in for `text_encoders`, such as wrappers around them.
        """
        self._restore("text_encoder", "text_encoder_2")
        layer = TEXT_LAYER_OF_SDXL if self.has_pooled else -self.clip_skip
        norm = None if self.has_pooled else self.text_encoder.final_layer_norm
        found = [
            hidden_states(encoder, ids.to(self.device), layer, norm)
            for encoder, ids in zip(encoders or self.text_encoders, tokens.unbind(1), strict=True)
        ]
        hidden = torch.cat([hidden for hidden, _ in found], dim=-1)
        return TextEmbedding(hidden, found[-1][1] if self.has_pooled else None)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], max_tokens: int = CHUNK_TOKENS) -> TextEmbedding:
        """Encode texts, without gradient."""
        return self.encode_tokens(self.tokens(texts, max_tokens))

    # --- pictures ---

    @torch.no_grad()
    def encode_picture(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of the latents of pictures, scaled; float32 on the CPU.

        Where a narrow VAE overflows, it is asked again in float32; what is not finite then is
        returned as it is.

        Args:
            pixels: (pictures, 3, height, width), -1 to 1.
        """
        config = self.vae.config
        moments = self._through_vae(lambda x: self.vae.encode(x).latent_dist.parameters, pixels)
        posterior = DiagonalGaussianDistribution(moments)
        mean = (posterior.mean - (config.shift_factor or 0.0)) * config.scaling_factor
        deviation = posterior.std * config.scaling_factor
        return mean.cpu().contiguous(), deviation.cpu().contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures of scaled latents (pictures, channels, height, width).

        Raises:
            BaseModelError: a picture is no finite numbers, in float32 neither.
        """
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (config.shift_factor or 0.0)
        pixels = self._through_vae(lambda x: self.vae.decode(x).sample, unscaled)
        if not torch.isfinite(pixels).all():
            raise BaseModelError(
                f"The picture holds values that are not finite numbers, in float32 too: the "
                f"adapter or the base model '{self.name}' is damaged, or base.dtype is too narrow "
                f"for it."
            )
        processor = VaeImageProcessor(vae_scale_factor=self.vae_factor)
        pictures: list[Image.Image] = processor.postprocess(pixels, output_type="pil")
        return pictures

    def _through_vae(self, step: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """The VAE's output in float32. What a narrow VAE overflows on is done in float32."""
        self._restore("vae")
        dtype = self.vae.dtype
        with torch.autocast(self.device.type, enabled=False):
            outputs = step(inputs.to(self.device, dtype)).float()
            broken = ~torch.isfinite(outputs).flatten(1).all(1)
            if dtype != torch.float32 and broken.any():
                self.vae.to(torch.float32)
                try:
                    outputs[broken] = step(inputs.to(self.device, torch.float32)[broken])
                finally:
                    self.vae.to(dtype)
        return outputs

    # --- what it is for ---

    def predict(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: TextEmbedding,
        time_ids: Tensor | None = None,
        unet: nn.Module | None = None,
    ) -> Tensor:
        """What the UNet predicts for noisy latents (n, channels, height, width).

        Args:
            time_ids: (n, 6), for SDXL: the original height and width, the crop's top and left, the
                target height and width, in pixels.
            unet: stands in for the own one, such as a wrapper around it.
        """
        dtype = self.unet.dtype
        more = {}
        if self.has_pooled:
            if time_ids is None or text.pooled is None:
                raise ValueError("SDXL wants time_ids and a pooled text embedding")
            more["added_cond_kwargs"] = {
                "text_embeds": text.pooled.to(self.device, dtype),
                # As they are: bfloat16 would round a size of 1021 to 1024.
                "time_ids": time_ids.to(self.device, torch.float32),
            }
        predicted: Tensor = (unet or self.unet)(
            noisy.to(dtype), timesteps, text.hidden.to(self.device, dtype), **more
        ).sample
        return predicted

    def eval(self) -> None:
        """Leave training: no dropout anywhere."""
        for part in self.components.values():
            part.eval()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()
        for encoder in (self.text_encoder, self.text_encoder_2):
            if encoder is not None:
                encoder.activation_checkpointing_enable({"use_reentrant": False})

    def noise_schedule(self) -> DDPMScheduler:
        """The training schedule: adds noise and knows each timestep's signal-to-noise ratio."""
        return DDPMScheduler.from_config(self.scheduler.config)

    def pipeline(self, **instead: nn.Module) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """diffusers' pipeline over these same parts, nothing copied.

        Args:
            instead: modules by name, to stand in for parts of its own; it cannot draw then, as
                parts that were let go stay away.
        """
        if not instead:
            self.restore()
        parts = {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "unet": self.unet,
            "scheduler": self.scheduler,
        }
        if self.has_pooled:
            parts |= {"text_encoder_2": self.text_encoder_2, "tokenizer_2": self.tokenizer_2}
            pipeline = StableDiffusionXLPipeline(**(parts | instead), add_watermarker=False)
        else:
            pipeline = StableDiffusionPipeline(
                **(parts | instead),
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # --- parts that are not wanted for a while ---

    def release(self, *parts: str) -> None:
        """Let 'vae', 'text_encoder' or 'text_encoder_2' go until they are used again, as `idle`
        has it: leave memory, wait in the CPU's, or stay.

        Raises:
            ValueError: an adapter is in one that is to leave, which no file holds.
        """
        self.idle.release(*parts)

    def restore(self) -> None:
        """Bring back what was released.

        Raises:
            BaseModelError: its files are not there any more, or hold something else now.
        """
        self.idle.restore()

    def _restore(self, *parts: str) -> None:
        self.idle.restore(*parts)
