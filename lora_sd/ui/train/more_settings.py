"""Which settings of the form are open, and under which fold each of the others is."""

from collections.abc import Callable

import gradio as gr

from lora_sd.ui import fields
from lora_sd.ui.texts import say

MAIN_FIELDS = (
    "data.folder", "data.trigger_word", "data.caption", "base.model", "output.name", "train.steps",
    "train.batch_size", "optimizer.learning_rate", "adapter.rank", "data.resolution_px",
    "train.seed", "sample.prompts",
)  # fmt: skip
FOLDS = {
    "pictures": ("sets.more", "data.max_aspect_ratio", "data.background", "data.bad_pictures",
                 "data.upscale"),
    "captions": ("data.caption_fallback", "data.max_tokens", "data.caption_prefix",
                 "data.caption_suffix", "data.caption_dropout", "data.tag_dropout",
                 "data.shuffle_tags", "data.wildcards", "data.keep_tags"),
    "augmentation": ("data.crop_jitter", "data.colour_jitter", "data.variants", "data.flip"),
    "masks": ("data.masks", "data.unmasked_weight"),
    "validation": ("sets.validation", "train.validate_every_steps", "train.keep_best",
                   "train.patience"),
    "regularisation": ("sets.regularisation", "sets.prior_weight", "sets.class_caption",
                       "sets.class_pictures"),
    "cache": ("data.cache",),
    "base": (),
    "adapter": (),
    "train": (),
    "optimizer": (),
    "objective": (),
    "memory": (),
    "sample": ("sample.prompt_file",),
    "output": (),
}  # fmt: skip
"""The folds in their order, with what stands in each; a setting that none names is in the one of
its group, one of `data` in the first."""


def folded_settings() -> dict[str, list[str]]:
    """What the page does not show at once, by fold."""
    folds = {fold: list(names) for fold, names in FOLDS.items()}
    placed = {*MAIN_FIELDS, *(name for names in FOLDS.values() for name in names)}
    for name in fields.FIELDS:
        if name not in placed:
            group = name.partition(".")[0]
            folds[group if group in folds else next(iter(folds))].append(name)
    return folds


def build_more_settings(add: Callable[..., None]) -> dict[str, gr.Accordion]:
    """Every folded setting; the fold of each."""
    found = {}
    for fold, names in folded_settings().items():
        title = say(f"train.fold.{fold}")
        with gr.Accordion(title, open=False, elem_id=f"more-{fold}") as accordion:
            for name in names:
                add(name)
                found[name] = accordion
    return found
