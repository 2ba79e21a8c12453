"""What a base model predicts, as far as its files say so.

| where | what says so |
| --- | --- |
| a folder, a single file with configs | the scheduler's config |
| a single file | tensors named `v_pred` and `ztsnr`, which v-prediction models of SDXL carry |
| | its metadata: ModelSpec's, or kohya's of a fine-tune |
| | a `.yaml` of its name beside it, as A1111 wants it: `parameterization: v` |

Without any, Stable Diffusion 1 and XL predict the noise. Stable Diffusion 2 comes in both kinds.
"""

from dataclasses import dataclass

import yaml

from lora_sd.base_files.files import BaseFiles
from lora_sd.errors import BaseModelError

PREDICTION_TYPES = ("epsilon", "v_prediction")
NAMES = {"v": "v_prediction", "v_prediction": "v_prediction", "eps": "epsilon"}
KOHYA_V = {"true": "v_prediction", "false": "epsilon"}
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"


@dataclass(frozen=True)
class Prediction:
    """What a model predicts ('epsilon', 'v_prediction'), whether that is known rather than a guess,
    and whether its last timestep is pure noise."""

    type: str
    is_known: bool
    zero_terminal_snr: bool


def find_prediction(
    files: BaseFiles, asked_type: str = "auto", asked_zero: str = "auto"
) -> Prediction:
    """What a model predicts: as asked, else as its files say, else what is usual.

    Args:
        asked_type: 'auto', 'epsilon' or 'v_prediction'.
        asked_zero: 'auto', 'yes' or 'no'.

    Raises:
        BaseModelError: it predicts something else, or the two do not go together.
    """
    said_type, said_zero = said(files)
    if said_type and said_type not in PREDICTION_TYPES:
        raise BaseModelError(
            f"'{files.name}' predicts '{said_type}'; only {' and '.join(PREDICTION_TYPES)} can be "
            f"trained."
        )
    found = asked_type if asked_type != "auto" else said_type
    zero = asked_zero == "yes" if asked_zero != "auto" else bool(said_zero)
    if zero and found == "epsilon":
        raise BaseModelError(
            f"'{files.name}' cannot predict the noise (epsilon) with zero terminal SNR: its last "
            f"timestep is nothing but noise, from which no picture could be told. Set "
            f"base.prediction_type to v_prediction, or base.zero_terminal_snr to no."
        )
    if found is None:
        guess = "v_prediction" if zero else "epsilon"
        return Prediction(guess, zero or files.family != "sd21", zero)
    return Prediction(found, True, zero)


def said(files: BaseFiles) -> tuple[str | None, bool | None]:
    """(prediction type, zero terminal SNR) as the files have it; None where they say nothing."""
    if files.has_configs:
        config = files.config("scheduler")
        zero = bool(config.get("rescale_betas_zero_snr"))
        return (str(config.get("prediction_type", "epsilon")) if config else None), zero
    keys = {stored.key for stored in files.rest}
    metadata = files.metadata
    zero_said = ZERO_SNR_KEY in keys or metadata.get("ss_zero_terminal_snr", "").lower() == "true"
    if V_KEY in keys:
        return "v_prediction", zero_said
    if modelspec := metadata.get("modelspec.prediction_type", "").lower().replace("-", "_"):
        return NAMES.get(modelspec, modelspec), zero_said
    if by_kohya := KOHYA_V.get(metadata.get("ss_v_parameterization", "").lower()):
        return by_kohya, zero_said
    kohya = metadata.get("ss_base_model_version", "")
    if metadata.get("modelspec.architecture", "").endswith("-v") or kohya.endswith("_v"):
        return "v_prediction", zero_said
    return _said_in_yaml(files), zero_said


def _said_in_yaml(files: BaseFiles) -> str | None:
    path = files.path.with_suffix(".yaml")
    if not path.is_file():
        return None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        parameters = config["model"]["params"]
        return NAMES[parameters.get("parameterization", "eps")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise BaseModelError(
            f"'{path}' beside the base model is not a config of Stable Diffusion: it has no "
            f"model.params, or a parameterization other than 'v' and 'eps'. Mend it, move it away, "
            f"or rename it."
        ) from error
