"""The settings that the Train tab folds away, by group."""

from collections.abc import Callable

import gradio as gr

from lora_sd.ui import fields
from lora_sd.ui.train.handlers import OWN_FIELDS

MAIN_FIELDS = (
    "data.trigger_word", "data.caption", "output.name", "base.model", "train.steps",
    "train.batch_size", "optimizer.learning_rate", "adapter.rank", "data.resolution_px",
    "train.seed", "sample.prompts",
)  # fmt: skip
DATA_GROUPS = {
    "Pictures": ("max_aspect_ratio", "background", "bad_pictures", "upscale"),
    "Captions": (
        "caption_fallback", "max_tokens", "caption_prefix", "caption_suffix", "caption_dropout",
        "tag_dropout", "shuffle_tags", "wildcards", "keep_tags",
    ),
    "Augmentation": ("crop_jitter", "colour_jitter", "variants", "flip"),
    "Masks": ("masks", "unmasked_weight"),
    "Cache": ("cache",),
}  # fmt: skip
"""Groups of the settings of `data`; one that is in none of them goes to the first."""
GROUPS = {
    "base": "Base model",
    "adapter": "Adapter",
    "train": "Training",
    "optimizer": "Optimizer and learning rates",
    "objective": "Objective: noise, timesteps, errors",
    "memory": "Memory and speed",
    "sample": "Samples on the way",
    "output": "What is kept",
}
FIELD_MIN_PX = 180  # two in a row, but on a phone


def folded_settings() -> dict[str, list[str]]:
    """The settings that the page does not show at once, by the title they are folded under."""
    titles = {f"data.{name}": title for title, names in DATA_GROUPS.items() for name in names}
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys([*titles, *fields.FIELDS]):
        if name not in (*OWN_FIELDS, *MAIN_FIELDS):
            title = titles.get(name) or GROUPS.get(name.partition(".")[0], next(iter(DATA_GROUPS)))
            groups.setdefault(title, []).append(name)
    return groups


def build_more_settings(add: Callable[..., None]) -> None:
    """Every setting that is not in the form yet, two in a row, folded by group."""
    for title, names in folded_settings().items():
        elem_id = f"more-{title.lower().replace(' ', '-')}"
        with gr.Accordion(title, open=False, elem_id=elem_id):
            for pair in zip(names[::2], [*names[1::2], None], strict=False):
                with gr.Row():
                    for name in pair:
                        if name:
                            add(name, min_width=FIELD_MIN_PX)
