"""Settings of the base model."""

from typing import Any, Literal

from pydantic import Field

from lora_sd.config.group import Group


class BaseGroup(Group):
    model: str = "tiny-sd"
    """The Stable Diffusion model to adapt: 'tiny-sd' (ships with the project), a .safetensors
    checkpoint as model sites offer them, the path of a diffusers folder, or a hub id."""
    vae: str | None = None
    """Another VAE for it: a .safetensors file, or a diffusers folder of one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the frozen base weights. 'auto': bfloat16 on a GPU that has it, float16 on
    other GPUs, float32 on the CPU. SDXL's VAE stays in float32 where float16 is too narrow."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the model predicts. 'auto': as its files say, else as its own loss on the pictures
    tells. What is said is checked against that loss either way."""
    zero_terminal_snr: Literal["auto", "yes", "no"] = "auto"
    """Whether its last timestep is pure noise, as some v-prediction models have it. 'auto': as
    its files say."""
    clip_skip: int = Field(1, ge=1, le=12)
    """Which of the text encoder's last layers is used: 1 the last, 2 the one before, as many
    anime models want it. Not for SDXL, which always uses the one before."""

    def options(self) -> dict[str, Any]:
        """Which model, as `base_model.load_base_model` takes it."""
        return {"name": self.model} | self.model_dump(exclude={"model", "dtype"})
