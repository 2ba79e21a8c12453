"""Settings of what a run draws and keeps."""

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from lora_sd.config.group import Group


class SampleGroup(Group):
    prompts: list[str] = []
    """Prompts for the pictures drawn during training and for the grid at the end; none: no
    pictures."""
    prompt_file: str | None = None
    """A text file of further prompts, one a line, each with settings of its own behind it as
    kohya's tools write them: '--n blurry --w 512 --h 768 --d 7 --s 30 --l 5 --am 0.8' (negative,
    width, height, seed, steps, guidance, scale). It is read again each time."""
    negative_prompt: str = ""
    """What the sample pictures should not show."""
    every_steps: int = Field(250, ge=0)
    """Draw the sample pictures every so many steps; 0: only the grid at the end."""
    steps: int = Field(25, ge=1, le=1000)
    """Denoising steps of a picture."""
    guidance: float = Field(7.5, ge=0, le=50, allow_inf_nan=False)
    """How strongly pictures follow the prompt (classifier-free guidance scale)."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seed of the first prompt's picture; the next prompt uses the next seed."""
    scales: list[Annotated[float, Field(allow_inf_nan=False)]] = [0.0, 0.25, 0.5, 0.75, 1.0]
    """Columns of the grid at the end: adapter scales, 0 being the base alone. None: no grid."""


class OutputGroup(Group):
    folder: str = "outputs"
    """Where run folders are made."""
    name: str | None = None
    """Name of the run's folder. Empty: the config file's name, with a number when that is taken."""
    save_every_steps: int = Field(250, ge=1)
    """Save a checkpoint, from which the run can go on, every so many steps."""
    on_full_disk: Literal["stop", "wait"] = "stop"
    """When there is no room for a checkpoint: stop, or wait until there is some."""
    tensorboard: bool = False
    """Write curves and samples for TensorBoard, too, into the run's folder."""
    wandb: str | None = None
    """Project on Weights & Biases to send curves and samples to; needs `pip install wandb`."""
    keep_checkpoints: int = Field(2, ge=2)
    """Newest checkpoints that are kept; at least two."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Precision of adapter.safetensors."""
    format: Literal["auto", "kohya", "diffusers"] = "auto"
    """Format of adapter.safetensors. kohya's is read by every program; diffusers' (PEFT's keys) by
    diffusers alone. 'auto': kohya's, or diffusers' for an adapter that kohya's cannot hold."""

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(
                "a name has 1 to 64 letters of English, digits, dots, dashes and underscores, and "
                "begins with a letter or a digit"
            )
        if name and name.split(".")[0].upper() in _WINDOWS_DEVICES:
            raise ValueError(f"'{name}' is a device name on Windows")
        return name


_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL"} | {
    f"{port}{n}" for port in ("COM", "LPT") for n in range(10)
}
