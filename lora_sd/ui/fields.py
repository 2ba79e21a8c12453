"""Config settings as form fields: their names, ranges and help come from config.py alone."""

import math
import re
from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import gradio as gr
from gradio.components import Component
from pydantic.fields import FieldInfo

from lora_sd.config import Config, Resolution, config_from_values, settings
from lora_sd.errors import ConfigError

LABELS = {
    "base.model": "Base model",
    "base.vae": "Another VAE",
    "base.dtype": "Base precision",
    "base.prediction_type": "What it predicts",
    "base.zero_terminal_snr": "Zero terminal SNR",
    "base.clip_skip": "CLIP skip",
    "data.caption": "Caption for pictures that have none",
    "data.caption_fallback": "Without a caption, take",
    "data.keep_tags": "Tags that stay in front",
    "data.wildcards": "Wildcards: draw one of {a|b}",
    "data.max_tokens": "Longest caption (tokens)",
    "data.resolution_px": "Resolution (px)",
    "data.max_aspect_ratio": "Longest shape (long / short side)",
    "data.upscale": "Enlarge small pictures",
    "data.background": "Background of transparent pictures",
    "data.bad_pictures": "Pictures that cannot be used",
    "data.flip": "Mirror at random",
    "data.crop_jitter": "Vary the crop by",
    "data.colour_jitter": "Vary the colours by",
    "data.variants": "Versions of each picture",
    "data.masks": "Masks",
    "data.unmasked_weight": "Weight of the rest",
    "data.cache": "Keep encoded pictures",
    "adapter.preset": "Layers",
    "adapter.include": "Further layers",
    "adapter.exclude": "Layers left alone",
    "adapter.init": "Start of lora_down",
    "adapter.text_encoder": "Text encoder learns too",
    "adapter.ranks": "Ranks of their own",
    "adapter.clamp_ranks": "Lower ranks where layers are small",
    "adapter.rs": "Rank-stabilised scaling (rsLoRA)",
    "adapter.dora": "DoRA",
    "adapter.up_bias": "Bias of lora_up",
    "output.format": "File format",
    "train.ema_decay": "Moving average (EMA)",
    "train.on_bad_numbers": "When numbers are not finite",
    "optimizer.name": "Optimizer",
    "optimizer.options": "Further arguments, one a line",
    "optimizer.conv_learning_rate": "Learning rate of convolutions",
    "optimizer.text_encoder_learning_rate": "Learning rate of the text encoder",
    "optimizer.text_encoder_2_learning_rate": "Learning rate of SDXL's second",
    "optimizer.block_learning_rates": "Factors by layer, one a line",
    "optimizer.lora_plus_ratio": "LoRA+ ratio",
    "optimizer.max_grad_norm": "Largest gradient norm",
    "optimizer.max_weight_norm": "Largest norm of an update",
    "optimizer.schedule_floor": "Falls to (share)",
    "optimizer.schedule_cycles": "Restarts of the cosine",
    "optimizer.schedule_power": "Power of the polynomial",
    "optimizer.decay_share": "Falls at the end over (share)",
    "optimizer.warmup_steps": "Warm-up (steps)",
    "objective.weighting": "Weighting of timesteps",
    "objective.snr_gamma": "Gamma of min-SNR",
    "objective.error": "Measure of the error",
    "objective.huber_c": "Huber's c",
    "objective.huber_schedule": "How c falls",
    "objective.multires_noise_iterations": "Noise of coarser resolutions",
    "objective.multires_noise_discount": "Their discount",
    "objective.timesteps": "Timesteps",
    "objective.timestep_bias": "Bias towards noise",
    "objective.logit_mean": "Mean of logit-normal",
    "objective.logit_deviation": "Deviation of logit-normal",
    "objective.min_timestep": "First timestep",
    "objective.max_timestep": "Last timestep",
    "memory.base_weights": "Bits of the base's weights",
    "memory.adapter_dtype": "Precision of what learns",
    "memory.channels_last": "Channels last",
    "memory.compile": "Compile (torch.compile)",
    "memory.vae_slicing": "VAE in slices and tiles",
    "memory.idle_parts": "VAE and text encoders when idle",
    "memory.on_out_of_memory": "When memory runs out",
    "sample.prompts": "Sample prompts, one a line",
    "sample.every_steps": "Draw every (steps)",
    "sample.steps": "Denoising steps",
    "output.name": "Name of the run",
    "output.save_every_steps": "Save every (steps)",
    "output.dtype": "File precision",
    "output.on_full_disk": "When the disk is full",
    "output.tensorboard": "TensorBoard",
    "output.wandb": "Weights & Biases: project",
}
MOST_TEXT = 20_000  # characters of one field: more is no setting
NOT_ON_THE_PAGE = (
    "data.folders", "data.cache_folder", "sample.prompt_file",
    # These want a folder of validation pictures, which the page cannot name.
    "train.validate_every_steps", "train.keep_best", "train.patience",
)  # fmt: skip
FIELDS: dict[str, FieldInfo] = {
    name: field for name, field in settings() if name not in NOT_ON_THE_PAGE
}


def label(name: str) -> str:
    """'Learning rate' for 'optimizer.learning_rate'."""
    return LABELS.get(name) or name.partition(".")[2].replace("_", " ").capitalize()


def help_text(name: str) -> str:
    """The setting's help, then its range where it has one worth telling."""
    text = " ".join((FIELDS[name].description or "").split()).replace("*", r"\*")  # Markdown
    low, high = _bound(name, "ge", "gt"), _bound(name, "le", "lt")
    if low is None or high is None or high >= 1_000_000 or low == high:
        return text
    above = any(getattr(part, "gt", None) is not None for part in FIELDS[name].metadata)
    return f"{text} {'Above ' if above else ''}{low:g} to {high:g}."


def component(name: str, value: Any, *, info: bool = True, **options: Any) -> Component:
    """The form field of a setting, showing `value`."""
    kind = _kind(name)
    shared = {
        "label": label(name),
        "info": help_text(name) if info else None,
        "elem_id": name.replace(".", "-"),
        **options,
    }
    shown = shown_value(name, value)
    if get_origin(kind) is Literal:
        return gr.Dropdown(list(get_args(kind)), value=shown, **shared)
    if kind is bool:
        return gr.Checkbox(shown, **shared)
    if kind in (int, float) and not _may_be_empty(name):
        is_share = kind is float and (_bound(name, "le", "lt") or 2) <= 1
        return gr.Number(shown, step=0.01 if is_share else 1, **shared)
    return gr.Textbox(shown, **{"lines": 2 if kind == list[str] else 1, **shared})


def shown_value(name: str, value: Any) -> Any:
    """What the field of a setting holds where the setting is `value`."""
    kind = _kind(name)
    if get_origin(kind) is list:
        return ("\n" if kind == list[str] else ", ").join(map(_plain, value))
    if kind in (int, float) and _may_be_empty(name):  # Gradio's number field turns empty into 0
        return "" if value is None else _plain(value)
    return "" if value is None else value


def config_from_form(form: Mapping[str, Any]) -> Config:
    """The checked configuration of field values by dotted name.

    The browser is not trusted: whatever is not of the setting's own type is a problem too.

    Raises:
        ConfigError: all problems at once, each naming the field as the page does.
    """
    values: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for name, raw in form.items():
        group, _, key = name.partition(".")
        try:
            values.setdefault(group, {})[key] = _value(name, raw)
        except ValueError as error:
            problems.append(f"'{name}' {error}.")
    try:
        config = config_from_values(values)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError([in_page_words(problem) for problem in problems])
    return config


def in_page_words(sentence: str) -> str:
    """A sentence of config.py with the fields named as on the page."""
    return re.sub(
        r"'?\b((?:base|data|adapter|train|optimizer|objective|memory|sample|output)\.\w+)(?:\.\d+)?\b'?",
        lambda found: f"'{label(found[1])}'" if found[1] in FIELDS else found[0],
        sentence,
    )


def form_values(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """The values of a configuration by dotted name."""
    groups = config.model_dump()
    return {name: groups[name.partition(".")[0]][name.partition(".")[2]] for name in names}


def _kind(name: str) -> Any:
    """The setting's type, without the None of an optional one."""
    annotation = FIELDS[name].annotation
    if get_origin(annotation) is Literal or get_origin(annotation) is list:
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if kinds else annotation


def _value(name: str, raw: Any) -> Any:
    kind = _kind(name)
    if get_origin(kind) is Literal and type(raw) is int:
        return raw
    if kind is bool:
        if not isinstance(raw, bool):
            raise ValueError("must be on or off")
        return raw
    if kind in (int, float):
        if _may_be_empty(name) and (raw is None or raw == ""):
            return None
        return _number(raw, whole=kind is int)
    if not isinstance(raw, str | None):
        raise ValueError("must be text")
    text = (raw or "").strip()
    if len(text) > MOST_TEXT or "\0" in text:
        raise ValueError(f"is too long, or no text: at most {MOST_TEXT} characters")
    if get_origin(kind) is list:
        if get_args(kind) == (str,):
            return [line.strip() for line in text.splitlines() if line.strip()]
        whole = kind == list[Resolution]
        return [_number(part, whole) for part in text.replace(",", " ").split()]
    return text or (None if _may_be_empty(name) else "")


def _may_be_empty(name: str) -> bool:
    return NoneType in get_args(FIELDS[name].annotation)


def _number(raw: Any, whole: bool) -> int | float:
    if isinstance(raw, str):
        try:
            raw = float(raw)
        except ValueError:
            raise ValueError(f"holds '{raw[:40]}', which is no number") from None
    if isinstance(raw, bool) or not isinstance(raw, int | float):
        raise ValueError("is empty: write a number")
    if not math.isfinite(raw):
        raise ValueError("must be a finite number")
    if whole and raw != int(raw):
        raise ValueError(f"is {raw:g}, but must be a whole number")
    return int(raw) if whole else float(raw)


def _plain(entry: Any) -> str:
    return f"{entry:g}" if isinstance(entry, float) else str(entry)


def _bound(name: str, *kinds: str) -> float | None:
    for part in FIELDS[name].metadata:
        for kind in kinds:
            if getattr(part, kind, None) is not None:
                return float(getattr(part, kind))
    return None
