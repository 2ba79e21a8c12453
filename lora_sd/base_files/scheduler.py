"""The scheduler that a base model draws pictures with, set to what the model predicts."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers
from diffusers import DDIMScheduler, SchedulerMixin

from lora_sd.errors import BaseModelError

ZERO_SNR = "rescale_betas_zero_snr"


def make_scheduler(
    name: str, config: Mapping[str, Any], prediction_type: str, zero_terminal_snr: bool
) -> SchedulerMixin:
    """The scheduler of a config; DDIM where that one knows no zero terminal SNR.

    With zero terminal SNR, drawing must begin at the last timestep (Lin et al. 2023, "Common
    Diffusion Noise Schedules and Sample Steps are Flawed", section 3.3).

    Args:
        name: of the base model, for errors.

    Raises:
        BaseModelError: the config is damaged, or of no scheduler of Stable Diffusion.
    """
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    settings = {**config, "prediction_type": prediction_type}
    settings.pop(ZERO_SNR, None)
    try:
        if not inspect.isclass(kind) or not issubclass(kind, SchedulerMixin):
            raise TypeError(f"there is no scheduler '{config.get('_class_name')}'")
        known = inspect.signature(kind.__init__).parameters
        if not {"beta_schedule", "prediction_type"} <= known.keys():
            raise TypeError(f"a '{kind.__name__}' draws with other models")
        if zero_terminal_snr:
            settings |= {ZERO_SNR: True, "timestep_spacing": "trailing"}
            kind = kind if ZERO_SNR in known else DDIMScheduler
        return kind.from_config(settings)
    except (TypeError, ValueError, LookupError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BaseModelError(f"The scheduler of '{name}' cannot be used: {reason}.") from error
