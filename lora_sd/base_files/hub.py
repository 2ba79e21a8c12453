"""Find a base model's files; those of a model on Hugging Face's hub are fetched into its cache on
this machine."""

from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

from lora_sd.base_files.files import BaseFiles
from lora_sd.base_files.opening import NotHere, open_base, open_folder
from lora_sd.errors import BaseModelError

PLAIN, HALF = None, "fp16"
NOT_WANTED = ("safety_checker", "feature_extractor", "image_encoder")


def find_base(name: str, half: bool = False) -> BaseFiles:
    """Open a base model's files, as `open_base` does, and fetch them first where need be.

    What is in the cache is used as it is: whether the hub has a newer version is not asked.

    Args:
        half: as of `fetch`.

    Raises:
        BaseModelError: as of `open_base` and `fetch`.
    """
    try:
        return open_base(name)
    except NotHere:
        return open_folder(name, fetch(name, half))


def fetch(hub_id: str, half: bool = False) -> Path:
    """The folder of a model of the hub, fetched where it is not in the cache yet.

    Safetensors only, and no program of the hub's is ever run.

    Args:
        half: the weights in float16 are asked for first, half as much to fetch, rather than last.

    Raises:
        BaseModelError: it is not on the hub, the hub is out of reach, or it has no safetensors.
    """
    reason: Exception | None = None
    for variant in (HALF, PLAIN) if half else (PLAIN, HALF):
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
            reason = error if variant is PLAIN else reason or error
    raise BaseModelError(
        f"The base model '{hub_id}' is not on this machine and cannot be fetched from the hub: "
        f"{str(reason).strip().splitlines()[0]}"
    ) from reason
