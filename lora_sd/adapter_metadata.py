"""What an adapter's file says about how it was made, and the settings read back out of it.

`ss_*` keys are kohya's, which A1111, Forge and kohya's tools show; `modelspec.*` is Stability's
ModelSpec 1.0.1; `lora_sd.*` is our own: the whole configuration and the loss curve. No path and no
name of a picture is among them, and no time: the same run under the same name gives the same file
on the same day. The date is that of the run's start, or of SOURCE_DATE_EPOCH
(reproducible-builds.org); `sshs_model_hash` never depends on it.
"""

import base64
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from lora_sd import __version__
from lora_sd.base_model import BaseModel
from lora_sd.config import Config
from lora_sd.data.captions import plain_caption
from lora_sd.data.picture_set import Picture
from lora_sd.data.views import View
from lora_sd.errors import ConfigError
from lora_sd.formats import versions
from lora_sd.formats.safetensors_file import read_header
from lora_sd.known_bases import EMBEDDED, HUB_ID
from lora_sd.run_folder import RunFolder

CONFIG = "lora_sd.config"
LOSS_CURVE = "lora_sd.loss_curve"
FURTHER_FOLDERS = "lora_sd.further_folders"
CURVE_POINTS = 100
MOST_TAGS = 500
THUMBNAIL_PX = 256
PLACES = (  # settings that say where things lie on a machine
    ("base", "vae"),
    ("data", "folder"),
    ("data", "folders"),
    ("data", "cache_folder"),
    ("output", "folder"),
    ("output", "name"),
    ("sample", "prompt_file"),
)


def describe_run(config: Config, base: BaseModel, name: str) -> dict[str, str]:
    """What is known of a run before its first step."""
    options, adapter, side = config.train, config.adapter, max(config.data.resolution_px)
    optimizer, objective = config.optimizer, config.objective
    metadata = {
        "ss_output_name": name,
        "ss_sd_model_name": _shared_model(config.base.model),
        **versions.adapter_metadata(base.kohya_version),
        "ss_steps": str(options.steps),
        "ss_max_train_steps": str(options.steps),
        "ss_learning_rate": str(optimizer.learning_rate),
        "ss_unet_lr": str(optimizer.learning_rate),
        "ss_text_encoder_lr": _text_rates(config) if adapter.text_encoder else "None",
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": str(optimizer.warmup_steps),
        "ss_optimizer": optimizer.name,
        "ss_batch_size_per_device": str(options.batch_size),
        "ss_gradient_accumulation_steps": str(options.gradient_accumulation),
        "ss_gradient_checkpointing": str(config.memory.gradient_checkpointing),
        "ss_max_grad_norm": str(optimizer.max_grad_norm),
        "ss_min_snr_gamma": str(objective.snr_gamma if objective.weighting == "min_snr" else None),
        "ss_debiased_estimation": str(objective.weighting == "debiased"),
        "ss_loss_type": objective.error,
        "ss_noise_offset": str(objective.noise_offset or None),
        "ss_multires_noise_iterations": str(objective.multires_noise_iterations or None),
        "ss_multires_noise_discount": str(objective.multires_noise_discount),
        "ss_ip_noise_gamma": str(objective.input_perturbation or None),
        "ss_scale_weight_norms": str(optimizer.max_weight_norm),
        "ss_caption_dropout_rate": str(config.data.caption_dropout),
        "ss_caption_tag_dropout_rate": str(config.data.tag_dropout),
        "ss_shuffle_caption": str(config.data.shuffle_tags),
        "ss_keep_tokens": str(config.data.keep_tags),
        "ss_flip_aug": str(config.data.flip),
        "ss_enable_bucket": str(config.data.max_aspect_ratio > 1),
        "ss_bucket_no_upscale": str(not config.data.upscale),
        "ss_max_token_length": str(config.data.max_tokens),
        "ss_clip_skip": str(config.base.clip_skip),
        "ss_zero_terminal_snr": str(base.zero_terminal_snr),
        "ss_network_dropout": str(adapter.dropout or None),
        "ss_resolution": f"({side}, {side})",
        "ss_seed": str(options.seed),
        "ss_mixed_precision": options.mixed_precision,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "v" if base.prediction_type == "v_prediction" else "epsilon",
        "lora_sd.version": __version__,
        CONFIG: json.dumps(shared_config(config), ensure_ascii=False),
        FURTHER_FOLDERS: str(len(config.data.folders)),
    }
    if config.data.trigger_word:
        metadata["modelspec.trigger_phrase"] = config.data.trigger_word
    return metadata


def describe_data(views: Sequence[View]) -> dict[str, str]:
    """How many pictures, of what sizes, and how often each tag stands in their captions.

    Tags are what commas part, as kohya counts them; the folders go by what they are for.
    """
    kinds: dict[str, dict[str, Picture]] = {"training": {}, "regularisation": {}}
    for view in views:
        kinds[view.picture.options.kind][str(view.picture.file)] = view.picture
    sizes = Counter(view.crop.size_px for view in views)
    tags = Counter(
        tag
        for picture in kinds["training"].values()
        for part in plain_caption(picture.caption, picture.options).split(",")
        if (tag := part.strip())
    )
    return {
        "ss_num_train_images": str(len(kinds["training"])),
        "ss_num_reg_images": str(len(kinds["regularisation"])),
        "ss_tag_frequency": json.dumps({"pictures": dict(tags.most_common(MOST_TAGS))}),
        "ss_dataset_dirs": json.dumps(
            {
                {"training": "pictures"}.get(kind, kind): {
                    "n_repeats": max(1, round(sum(p.repeats for p in some.values()) / len(some))),
                    "img_count": len(some),
                }
                for kind, some in kinds.items()
                if some
            }
        ),
        "ss_bucket_info": json.dumps(
            {
                "buckets": {
                    str(number): {"resolution": list(size), "count": count}
                    for number, (size, count) in enumerate(sorted(sizes.items()))
                }
            }
        ),
    }


def describe_result(run: RunFolder, sample: Path | None) -> dict[str, str]:
    """What is known at the end: the loss curve, the date, a thumbnail.

    Args:
        sample: a picture drawn with the adapter.
    """
    metadata = {"modelspec.date": _date(run)}
    if curve := loss_curve(run.read_metrics()):
        metadata[LOSS_CURVE] = json.dumps(curve)
    if sample is not None and sample.is_file():
        metadata["modelspec.thumbnail"] = _thumbnail(sample)
    return metadata


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """[last step, mean loss] of at most 100 equal stretches of a run."""
    points = [(m["step"], m["loss"]) for m in metrics if "step" in m and "loss" in m]
    size = max(1, -(-len(points) // CURVE_POINTS))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        [part[-1][0], round(sum(loss for _, loss in part) / len(part), 6)] for part in stretches
    ]


def settings_like(path: Path) -> tuple[dict[str, Any], str, int]:
    """(settings, unchecked, for `config_from_values`; name; how many of `data.folders`) that an
    adapter of ours was trained by.

    Where the pictures lie is not among them, nor a base model that lies in a folder.

    Raises:
        UserError: no adapter file, or none of ours.
    """
    metadata = read_header(path).metadata
    try:
        values = json.loads(metadata.get(CONFIG, ""))
        if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
            raise ValueError
    except (ValueError, RecursionError):
        raise ConfigError(
            f"'{path}' does not say how it was trained: only adapters of this trainer do. Use "
            f"--config."
        ) from None
    further = metadata.get(FURTHER_FOLDERS, "0")
    return (
        _without_places(values),
        metadata.get("ss_output_name", path.stem),
        int(further) if further.isdigit() else 0,
    )


def shared_config(config: Config) -> dict[str, Any]:
    """The configuration as it goes into the file: nothing of where things lie on this machine."""
    return _without_places(config.model_dump())


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that say where things lie on a machine."""
    kept = {group: dict(settings) for group, settings in values.items()}
    for group, name in PLACES:
        kept.get(group, {}).pop(name, None)
    if _is_private(str(kept.get("base", {}).get("model", ""))):
        kept.get("base", {}).pop("model", None)
    return kept


def _text_rates(config: Config) -> str:
    """'5e-05', or the rates of SDXL's two where they differ."""
    return ", ".join(dict.fromkeys(map(str, config.optimizer.text_encoder_rates().values())))


def _is_private(model: str) -> bool:
    return model not in EMBEDDED and (os.path.exists(model) or not HUB_ID.fullmatch(model))


def _shared_model(model: str) -> str:
    return Path(model).name if _is_private(model) else model


def _date(run: RunFolder) -> str:
    moment = os.environ.get("SOURCE_DATE_EPOCH", "")
    seconds = float(moment) if moment.isdigit() else run.config_file.stat().st_mtime
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def _thumbnail(sample: Path) -> str:
    with Image.open(sample) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
