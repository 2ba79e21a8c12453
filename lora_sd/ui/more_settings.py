"""The settings that the Train tab folds away, by group."""

from collections.abc import Callable

import gradio as gr

from lora_sd.ui import fields
from lora_sd.ui.train_handlers import OWN_FIELDS

MAIN_FIELDS = (
    "data.trigger_word", "data.caption", "output.name", "base.model", "train.steps",
    "train.batch_size", "train.learning_rate", "adapter.rank", "data.resolution_px", "train.seed",
    "sample.prompts",
)  # fmt: skip
DATA_GROUPS = {
    "Captions": (
        "caption_fallback", "max_tokens", "caption_prefix", "caption_suffix", "caption_dropout",
        "tag_dropout", "keep_tags", "shuffle_tags", "wildcards",
    ),
    "Augmentation": ("crop_jitter", "colour_jitter", "flip", "variants"),
    "Masks": ("masks", "unmasked_weight"),
    "Cache": ("cache",),
}  # fmt: skip
"""Settings of `data` that have a group of their own; the others are in the group 'Pictures'."""
GROUPS = {
    "base": "Base model",
    "adapter": "Adapter",
    "train": "Training",
    "sample": "Samples on the way",
    "output": "What is kept",
}


def folded_settings() -> dict[str, list[str]]:
    """The settings that the page does not show at once, by the title they are folded under."""
    groups: dict[str, list[str]] = {title: [] for title in ("Pictures", *DATA_GROUPS)}
    titles = {f"data.{name}": title for title, names in DATA_GROUPS.items() for name in names}
    for name in [*titles, *fields.FIELDS]:
        title = titles.get(name) or GROUPS.get(name.partition(".")[0], "Pictures")
        group = groups.setdefault(title, [])
        if name not in (*group, *OWN_FIELDS, *MAIN_FIELDS):
            group.append(name)
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
                            add(name)
