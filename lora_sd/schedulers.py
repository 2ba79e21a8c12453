"""The schedulers to draw with, by the names that Stable Diffusion's users know them by. Light: the
page reads it without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_sd.errors import BaseModelError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from lora_sd.base_model import BaseModel

KARRAS = {"use_karras_sigmas": True}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", KARRAS),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "LCM": ("LCMScheduler", {}),
}
"""diffusers' class of each, and what it is told beside the base's own config."""


def scheduler_named(name: str, base: BaseModel) -> SchedulerMixin:
    """A scheduler of a name, for what the base predicts; the base's own for no name.

    Raises:
        BaseModelError: there is none of that name, or it cannot draw with this base.
    """
    if not name:
        return base.scheduler
    from lora_sd.base_files.scheduler import make_scheduler

    if name not in SCHEDULERS:
        raise BaseModelError(f"There is no scheduler '{name}': there are {', '.join(SCHEDULERS)}.")
    kind, options = SCHEDULERS[name]
    made = make_scheduler(
        base.name,
        {**base.scheduler.config, **options, "_class_name": kind},
        base.prediction_type,
        base.zero_terminal_snr,
    )
    if type(made).__name__ != kind:
        raise BaseModelError(
            f"{name} cannot draw with '{base.name}', whose last timestep is pure noise (zero "
            f"terminal SNR). DDIM, DPM++, Euler and UniPC can."
        )
    return made
