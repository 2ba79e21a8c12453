"""Fetch a model of Hugging Face's hub into its cache on this machine."""

from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from lora_sd.errors import BaseModelError

VARIANTS = (None, "fp16")
NOT_WANTED = ("safety_checker", "feature_extractor", "image_encoder")


def fetch(hub_id: str) -> Path:
    """The folder of a model of the hub, fetched where it is not in the cache yet.

    Safetensors only, and no program of the hub's is ever run.

    Raises:
        BaseModelError: it is not on the hub, the hub is out of reach, or it has no safetensors.
    """
    reason: Exception | None = None
    for variant in VARIANTS:
        try:
            return Path(
                DiffusionPipeline.download(
                    hub_id,
                    variant=variant,
                    use_safetensors=True,
                    trust_remote_code=False,
                    **dict.fromkeys(NOT_WANTED),
                )
            )
        except (OSError, ValueError, HFValidationError, OfflineModeIsEnabled) as error:
            reason = reason or error
    raise BaseModelError(
        f"The base model '{hub_id}' is not on this machine and cannot be fetched from the hub: "
        f"{str(reason).strip().splitlines()[0]}"
    ) from reason
