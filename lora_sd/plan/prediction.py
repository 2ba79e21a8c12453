"""The memory of a run, phase by phase and part by part, from shapes alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lora_sd.data.training_data import VALIDATION_TIMES
from lora_sd.generate import PIXELS_DECODED_AT_ONCE, pictures_at_once
from lora_sd.plan import simulation
from lora_sd.plan.optimizer_states import states_bytes
from lora_sd.plan.packed import pack
from lora_sd.plan.setting import Setting
from lora_sd.plan.shaped_base import Arithmetic, attach, shaped_base

LOADING, TRAINING = "loading the base", "training"
TITLES = {"unet": "UNet", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


@dataclass(frozen=True)
class Phase:
    """What lies in memory at the highest moment of a part of the run: bytes by what it is."""

    name: str
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Prediction:
    """What a run takes on the device that computes.

    Args:
        name: of the base.
        configs: of its parts, by component.
        setting: how it is trained.

    Raises:
        BaseModelError: a config is of another kind of model.
    """

    def __init__(self, name: str, configs: Mapping[str, Any], setting: Setting, clip_skip: int = 1):
        self.setting = setting
        self.base = base = shaped_base(name, configs, clip_skip)
        has_wide_vae = setting.dtype == torch.float16 and base.has_pooled
        upcast = has_wide_vae and bool(base.vae.config.get("force_upcast", True))
        attach(
            base, setting.plans, setting.options,
            dtype=setting.dtype,
            vae_dtype=torch.float32 if upcast else setting.dtype,
            adapter_dtype=setting.adapter_dtype,
        )  # fmt: skip
        self._whole_unet = _frozen_bytes(base.unet)
        if setting.base_weights != "full":
            pack(base.unet, setting.base_weights, setting.autocast)
        self._arithmetic = Arithmetic(setting.autocast, setting.like_cuda)
        if setting.gradient_checkpointing:
            base.recompute_with(self._arithmetic)
        learning = [one for one in base.tensors() if one.requires_grad]
        self.adapter = sum(one.numel() * one.itemsize for one in learning)
        self.adapter += sum(
            start.numel() * start.itemsize
            for module in base.unet.modules()
            for start in (getattr(module, "down_start", None), getattr(module, "up_start", None))
            if isinstance(start, torch.Tensor)
        )
        self.gradients = sum(one.numel() * one.itemsize for one in learning)
        self.states = states_bytes(setting.optimizer, learning)
        self.average = 4 * sum(one.numel() for one in learning) if setting.ema else 0

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of the base's parts while they train, by name."""
        named = {TITLES[name]: module for name, module in self.base.components.items()}
        return {name: _frozen_bytes(one) for name, one in {**named, "VAE": self.base.vae}.items()}

    @property
    def parameters(self) -> int:
        """How many numbers learn."""
        return sum(one.numel() for one in self.base.tensors() if one.requires_grad)

    def phases(self) -> Iterator[Phase]:
        """Every part of the run that has a highest moment of its own; what is quickly known first:
        each is computed when it is asked for."""
        setting = self.setting
        yield _phase(LOADING, {**self.weights, "UNet": self._whole_unet}, self._own)
        activations = {"activations": self._encoding()}
        yield _phase("encoding pictures", self.weights, self._own, activations)
        if setting.samples and setting.sample_px:
            states = {"optimizer states": self.states}
            drawing = {**states, "activations": self._drawing()}
            yield _phase("drawing samples", self.weights, self._own, drawing)
            if setting.draws_grid and setting.base_weights == "full":
                copies = {"copies of adapted weights": self._adapted()}
                yield _phase("drawing the grid", self.weights, self._own, drawing, copies)
        training = self.training()
        yield training
        if setting.validates:
            checked = {"gradients": 0, "activations": self._validating()}
            yield _phase("validating", training.parts, checked)

    @property
    def _own(self) -> dict[str, int]:
        """What the adapter takes while it does not learn."""
        return {"adapter": self.adapter, "moving average": self.average}

    def training(self) -> Phase:
        """The training step."""
        setting = self.setting
        work = simulation.training_pass(
            self.base, self._arithmetic, setting.size_px, setting.batch_size,
            text=setting.text, max_tokens=setting.max_tokens, adds_up=setting.adds_up,
        )  # fmt: skip
        there = self.gradients if setting.adds_up else work.gradients
        working = work.highest - work.gradients
        # With few activations the highest moment is the optimizer's, when all gradients are there.
        working = max(working, self.gradients - there)
        staying = {name: size for name, size in self.weights.items() if self._stays(name)}
        learning = {"gradients": there, "optimizer states": self.states, "activations": working}
        return _phase(TRAINING, staying, self._own, learning)

    def _stays(self, part: str) -> bool:
        """Whether a part of the base is on the device while it trains."""
        if part == "UNet" or self.setting.keeps_idle_parts:
            return True
        return part != "VAE" and self.setting.text != "cached"

    def _encoding(self) -> int:
        return simulation.encoding(self.base, self._of_vae(self.setting.size_px)).highest

    def _validating(self) -> int:
        denoised = simulation.denoising(
            self.base, self._arithmetic, self.setting.size_px, VALIDATION_TIMES // 2,
            max_tokens=self.setting.max_tokens,
        )  # fmt: skip
        return denoised.highest

    def _drawing(self) -> int:
        setting = self.setting
        assert setting.sample_px is not None
        width, height = setting.sample_px
        together = min(setting.samples, pictures_at_once(width, height))
        decoded = min(together, max(1, PIXELS_DECODED_AT_ONCE // (width * height)))
        denoised = simulation.denoising(
            self.base, self._arithmetic, setting.sample_px, together, max_tokens=setting.max_tokens
        )
        decoded = 1 if setting.slices_vae else decoded
        size_px = self._of_vae(setting.sample_px)
        return max(denoised.highest, simulation.decoding(self.base, size_px, decoded).highest)

    def _of_vae(self, size_px: tuple[int, int]) -> tuple[int, int]:
        """What the VAE works on at once: with slices, tiles of the size it was made for."""
        if not self.setting.slices_vae:
            return size_px
        tile = int(self.base.vae.config.sample_size)
        return min(size_px[0], tile), min(size_px[1], tile)

    def _adapted(self) -> int:
        """What the base's weights take that the grid keeps a copy of while adapters are merged."""
        return sum(plan.weight_shape.numel() for plan in self.setting.plans) * (
            self.setting.dtype.itemsize
        )


def _phase(name: str, *parts: Mapping[str, int]) -> Phase:
    """A phase of what is not nothing; of parts named twice the last counts."""
    merged = {what: size for one in parts for what, size in one.items()}
    return Phase(name, {what: size for what, size in merged.items() if size})


def _frozen_bytes(module: nn.Module) -> int:
    """What the weights of a part take, adapters left out."""
    return sum(
        one.numel() * one.itemsize for one in module.parameters() if not one.requires_grad
    ) + sum(
        one.numel() * one.itemsize
        for name, one in module.named_buffers()
        if not name.endswith(("down_start", "up_start"))
    )
