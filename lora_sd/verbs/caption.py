"""`caption`: captions for pictures that have none, written by a published model."""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_sd.captioning.opening import (
    DETAILS,
    EXAMPLES,
    Captioner,
    CaptionerFiles,
    SentenceChoice,
    TagChoice,
    find_captioner,
)
from lora_sd.data.findings import counted
from lora_sd.errors import ConfigError, printable

if TYPE_CHECKING:
    from lora_sd.captioning.folder import Captioned

DESCRIPTION = f"""\
Write a .txt beside each picture that has no caption, in a folder and those inside it.

The model is a folder or a hub id, which is fetched the first time:
  BLIP         short sentences   {EXAMPLES["blip"]}
  Florence-2   longer ones       {EXAMPLES["florence2"]}
  WD14         booru tags        {EXAMPLES["tags"]}
WD14 taggers need onnxruntime: pip install -r requirements-captioning.txt

A picture that has a caption keeps it; an empty caption file is filled. Ctrl-C stops; the same
command goes on with the rest. Read what was written before you train on it: these models miss what
is special, and make things up."""
EXAMPLE = f"""\
  python -m lora_sd caption pictures/my-cat --model {EXAMPLES["florence2"]}
  python -m lora_sd caption pictures/ink --model {EXAMPLES["tags"]} \\
      --threshold 0.4 --exclude "border, signature" --trigger inkstyle"""

OPTIONS = {
    "tags": ("threshold", "character_threshold", "rating", "exclude"),
    "florence2": ("detail", "max_tokens"),
    "blip": ("max_tokens",),
}
"""Options that only some kinds of model have."""
MOST_TOKENS = 500  # BLIP has places for 512


def caption(
    folder: Path,
    model: str,
    *,
    trigger: str = "",
    prefix: str = "",
    suffix: str = "",
    batch_size: int = 4,
    overwrite: bool = False,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
    **options: Any,
) -> "Captioned":
    """Caption the pictures of a folder that have no caption.

    Args:
        model: a folder or a hub id.
        trigger: put in front of each caption, with a comma; prefix and suffix with a space.
        on_picture: called with (pictures done, in all); stops when it returns True.
        options: those of OPTIONS that are not to be as they are by default.

    Raises:
        ConfigError: an option is out of range, or not one of this kind of model.
        DataError: there is no such folder.
        CaptioningError: the model cannot be found, read or used.
        UserError: a caption cannot be written.
    """
    from lora_sd.captioning.folder import Captioned, caption_folder, find_tasks
    from lora_sd.data.captions import plain_caption
    from lora_sd.data.folder_options import FolderOptions

    check_ranges(options, batch_size)
    tasks, had = find_tasks(folder, overwrite)
    if not tasks:
        return Captioned(had_captions=had)
    files = find_captioner(model)
    foreign = [name for name in options if name not in OPTIONS[files.kind]]
    if foreign:
        raise ConfigError([f"'{model}' has no option {flag(name)}." for name in foreign])
    words = FolderOptions(
        folder, trigger_word=trigger, caption_prefix=prefix, caption_suffix=suffix
    )
    return caption_folder(
        folder,
        open_captioner(files, options),
        partial(plain_caption, options=words),
        batch_size=batch_size,
        overwrite=overwrite,
        on_picture=on_picture,
    )


def open_captioner(files: CaptionerFiles, options: dict[str, Any]) -> Captioner:
    """Load the model with the options of its kind."""
    if files.kind == "tags":
        from lora_sd.captioning.tags import TagCaptioner

        return TagCaptioner(files, TagChoice(**options))
    from transformers.utils import logging

    from lora_sd.base_loading import pick_device
    from lora_sd.captioning.sentences import SentenceCaptioner

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return SentenceCaptioner(files, SentenceChoice(**options), pick_device())


def check_ranges(options: dict[str, Any], batch_size: int) -> None:
    """Raises ConfigError for numbers that cannot be."""
    problems = []
    for name in ("threshold", "character_threshold"):
        value = options.get(name, 0.5)
        if math.isnan(value) or not 0 <= value <= 1:
            problems.append(f"{flag(name)} is {value:g}; it is a probability, 0 to 1.")
    if not 1 <= options.get("max_tokens", 1) <= MOST_TOKENS:
        problems.append(f"--max-tokens is {options['max_tokens']}; it must be 1 to {MOST_TOKENS}.")
    if not 1 <= batch_size <= 1024:
        problems.append(f"--batch-size is {batch_size}; it must be 1 to 1024.")
    if problems:
        raise ConfigError(problems)


def flag(name: str) -> str:
    """'--max-tokens' for 'max_tokens'."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of pictures")
    parser.add_argument("--model", required=True, help="a folder or a hub id; see above")
    parser.add_argument("--trigger", default="", metavar="WORD", help="put before each caption")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="text behind the trigger word")
    parser.add_argument("--suffix", default="", metavar="TEXT", help="text after each caption")
    parser.add_argument(
        "--batch-size", type=int, default=4, metavar="N", help="pictures at once (default: 4)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="write anew what is in .txt files already"
    )
    # An option that was not given is not there, as one of another kind of model is refused.
    sentence, choice = SentenceChoice(), TagChoice()
    sentences = parser.add_argument_group("BLIP and Florence-2", argument_default=argparse.SUPPRESS)
    sentences.add_argument(
        "--detail",
        choices=DETAILS,
        help=f"Florence-2 alone: how much it says (default: {sentence.detail})",
    )
    sentences.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help=f"longest caption (default: {sentence.max_tokens})",
    )
    tags = parser.add_argument_group("WD14", argument_default=argparse.SUPPRESS)
    tags.add_argument(
        "--threshold",
        type=float,
        metavar="P",
        help=f"least probability of a tag (default: {choice.threshold})",
    )
    tags.add_argument(
        "--character-threshold",
        type=float,
        metavar="P",
        help=f"the same of a character's name (default: {choice.character_threshold})",
    )
    tags.add_argument("--rating", action="store_true", help="the likeliest rating is a tag, too")
    tags.add_argument(
        "--exclude",
        type=lambda text: tuple(tag for tag in text.split(",") if tag.strip()),
        metavar="TAGS",
        help="tags to leave out, parted by commas",
    )


def run(options: argparse.Namespace) -> int:
    """Caption, and say what came of it."""
    from tqdm import tqdm

    with tqdm(desc="captioning", unit="picture", leave=False, disable=None) as bar:

        def show(done: int, of: int) -> bool:
            bar.total = of
            bar.update(done - bar.n)
            return False

        done = caption(**vars(options), on_picture=show)
    written, had = counted(len(done.written), "caption"), counted(done.had_captions)
    print(f"{written} written, {had} had theirs already.")
    for picture, reason in done.left_out:
        print(f"'{printable(str(picture))}' {reason}: no caption.")
    return 0
