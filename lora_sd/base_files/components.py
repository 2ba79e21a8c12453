"""Build a base model's parts from its files: empty, from a config, then filled tensor by tensor, so
that loading takes little more memory than the model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Size, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_sd.base_files.files import WEIGHTS, BaseFiles
from lora_sd.base_files.vae import choose_vae
from lora_sd.errors import BaseModelError, Problems, UserError, shown_list
from lora_sd.parts import TEXT_ENCODERS

TITLES = {
    "unet": "UNet",
    "vae": "VAE",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
}
LAST_LAYER_OF_SD2 = "text_encoder.text_model.encoder.layers.23."


BUILDING_FAILS = (
    ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError,
    AssertionError, ImportError,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One part of a model in its files, and how it is loaded."""

    files: BaseFiles
    component: str
    dtype: torch.dtype
    _stamps: Mapping[Path, tuple[int, int]] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_stamps", self._look())

    def build(self, config: Mapping[str, Any], device: torch.device) -> nn.Module:
        """The part with its weights, frozen and in evaluation mode.

        Raises:
            BaseModelError: the config is of another kind of model, or the weights do not fit it;
                all that are missing, unexpected or of another shape are named.
        """
        title = TITLES[self.component]
        try:
            with init_empty_weights(include_buffers=False):
                module = empty_part(self.component, config)
        except BUILDING_FAILS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise BaseModelError(
                f"The base model '{self.files.name}' has a damaged config of its {title}: {reason}"
            ) from error
        self._check(module)
        self.fill(module, device)
        return module.requires_grad_(False).eval().to(device)

    def fill(self, module: nn.Module, device: torch.device) -> None:
        """Read the weights again from the files into a module that has none."""
        # All room is taken first: between what stays, each tensor read would leave a hole.
        tensors = {
            key: torch.empty_like(tensor, dtype=self.dtype, device=device)
            for key, tensor in module.state_dict().items()
        }
        for key, name in self._names(module).items():
            tensors[key].copy_(self.files.tensor(name))
        module.load_state_dict(tensors, assign=True)

    def is_touched(self) -> bool:
        """Whether its files have been written, or replaced by others, since they were opened.

        Raises:
            OSError: a file is gone.
        """
        return self._look() != self._stamps

    def _look(self) -> dict[Path, tuple[int, int]]:
        """(size in bytes, time of the last change in ns) of each file that holds some of it."""
        paths = {
            entry.stored.path
            for entry in self.files.entries
            if any(name.startswith(f"{self.component}.") for name in entry.piece.names)
        }
        seen = {path: path.stat() for path in paths}
        return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in seen.items()}

    def holds(self, module: nn.Module) -> bool:
        """Whether the files hold all that the module has."""
        return self.files.tensor_shapes.keys() >= set(self._names(module).values())

    def _names(self, module: nn.Module) -> dict[str, str]:
        """{key in the module's state: name in the files}."""
        return {key: tensor_name(self.component, key) for key in module.state_dict()}

    def _check(self, module: nn.Module) -> None:
        wanted = {
            tensor_name(self.component, key): tensor.shape
            for key, tensor in module.state_dict().items()
        }
        found = {
            name: shape
            for name, shape in self.files.tensor_shapes.items()
            if name.startswith(f"{self.component}.") and not self._is_left_out(name, wanted)
        }
        problems = differences(found, wanted)
        if not found and self.component == "vae":
            raise BaseModelError(
                f"The base model '{self.files.name}' holds no VAE: name one with base.vae."
            )
        if problems:
            raise BaseModelError(
                f"The base model '{self.files.name}' does not hold the {TITLES[self.component]} "
                f"that its config describes: {'; '.join(problems)}."
            )

    def _is_left_out(self, name: str, wanted: Mapping[str, Size]) -> bool:
        """Whether a tensor is not loaded, and need not be: a counter of old files; the last layer
        of SD 2's text encoder in single files, which the model does not use."""
        if name.endswith(".position_ids"):
            return True
        unused_layer = not self.files.is_folder and self.files.has_open_clip
        return unused_layer and name.startswith(LAST_LAYER_OF_SD2) and name not in wanted


def tensor_name(component: str, key: str) -> str:
    """A tensor's name, as in `original`, from its key in the module's state."""
    if component in TEXT_ENCODERS and not key.startswith(("text_model.", "text_projection.")):
        key = f"text_model.{key}"  # transformers 5.6 and newer leave it out
    return f"{component}.{key}"


def differences(found: Mapping[str, Size], wanted: Mapping[str, Size]) -> list[str]:
    """How tensors differ from those wanted, as parts of a sentence; empty: not at all."""
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    other = [
        f"'{name}' is {_shape(found[name])} instead of {_shape(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] != wanted[name]
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({shown_list(missing, 2)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({shown_list(unexpected, 2)})")
    if other:
        problems.append(f"{len(other)} of another shape ({', '.join(other[:2])})")
    return problems


def _shape(size: Size) -> str:
    return "x".join(map(str, size)) or "a number"


def empty_part(component: str, config: Mapping[str, Any]) -> nn.Module:
    """A part without weights."""
    if component == "unet":
        module: nn.Module = UNet2DConditionModel.from_config(dict(config))
    elif component == "vae":
        module = AutoencoderKL.from_config(dict(config))
    else:
        kind = CLIPTextModel if component == "text_encoder" else CLIPTextModelWithProjection
        module = kind(CLIPTextConfig.from_dict(dict(config)))
    return module


def load_parts(
    files: BaseFiles, device: torch.device, dtype: torch.dtype, vae: str | None
) -> tuple[dict[str, Part], dict[str, Any]]:
    """(where each part comes from, the parts), by component.

    SDXL's VAE stays in float32 where float16 is asked for, unless its config says that float16 is
    wide enough for it, as in diffusers.

    Args:
        vae: of another VAE, or None.

    Raises:
        BaseModelError: parts cannot be built; all problems at once.
    """
    sources: dict[str, Part] = {}
    modules: dict[str, Any] = {}
    problems = Problems()
    for component in WEIGHTS:
        if component == "text_encoder_2" and not files.has_component(component):
            continue
        with problems.gathered():
            source, config = files, files.config(component)
            part_dtype = dtype
            if component == "vae":
                source, config = choose_vae(files, config, vae)
                is_narrow = dtype == torch.float16 and files.has_component("text_encoder_2")
                if is_narrow and config.get("force_upcast", True):
                    part_dtype = torch.float32
            sources[component] = Part(source, component, part_dtype)
            modules[component] = sources[component].build(config, device)
    try:
        problems.tell()
    except UserError as error:
        raise BaseModelError(error.problems) from None
    return sources, modules
