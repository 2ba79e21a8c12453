"""Write a caption beside each picture of a folder that has none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lora_sd import durable
from lora_sd.captioning.opening import Captioner
from lora_sd.data.caption_files import is_empty, path_key
from lora_sd.data.caption_sources import CaptionSources
from lora_sd.data.folder_options import FolderOptions
from lora_sd.data.images import UnreadableImage, read_image
from lora_sd.data.listing import list_folder, stem_key

OWN = ".txt"


@dataclass(frozen=True)
class Captioned:
    """What came of a folder.

    Attributes:
        written: the caption files.
        had_captions: how many pictures were left as they are.
        left_out: pictures that got no caption, with the reason as a sentence's end.
    """

    written: list[Path] = field(default_factory=list)
    had_captions: int = 0
    left_out: list[tuple[Path, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """A picture, the file that its caption goes to, and whether what that file holds may go."""

    picture: Path
    target: Path
    replaces: bool = False


def find_tasks(folder: Path, overwrite: bool = False) -> tuple[list[Task], int]:
    """(what there is to do, how many pictures have their caption) in a folder and those inside it.
    Caption files that are empty are to be filled.

    Args:
        overwrite: pictures with a .txt are to be done again. A caption in a .caption file or in
            metadata.jsonl stays: a .txt beside it would be a second one.

    Raises:
        DataError: there is no such folder, or it cannot be read.
    """
    listing = list_folder(folder)
    elsewhere = CaptionSources(listing, FolderOptions(folder)).metadata
    tasks: dict[str, Task] = {}
    had = 0
    for name in listing.pictures:
        stem = stem_key(name)
        own = listing.captions.get(stem, [])
        picture, target = listing.path(name), listing.path(own[0]) if own else None
        if stem in tasks:
            had += 1
        elif target and is_empty(target):
            tasks[stem] = Task(picture, target, replaces=True)
        elif path_key(name) in elsewhere:
            had += 1
        elif target is None:
            tasks[stem] = Task(picture, picture.with_suffix(OWN))
        elif overwrite and all(file.lower().endswith(OWN) for file in own):
            tasks[stem] = Task(picture, target, replaces=True)
        else:
            had += 1
    return list(tasks.values()), had


def caption_folder(
    folder: Path,
    captioner: Captioner,
    dress: Callable[[str], str],
    *,
    batch_size: int = 1,
    overwrite: bool = False,
    on_picture: Callable[[int, int], bool] = lambda done, of: False,
) -> Captioned:
    """Caption the pictures that have none. What is written stays when this is stopped, and the next
    call goes on with the rest.

    Args:
        dress: what becomes of a model's caption before it is written: trigger word, prefix.
        batch_size: pictures that the model sees at once.
        overwrite: as of `find_tasks`.
        on_picture: called with (pictures done, in all) after each batch; stops when it is True.

    Raises:
        DataError: there is no such folder, or it cannot be read.
        UserError: a caption cannot be written.
    """
    tasks, had = find_tasks(folder, overwrite)
    result = Captioned(had_captions=had)
    for start in range(0, len(tasks), batch_size):
        batch = tasks[start : start + batch_size]
        _caption(batch, captioner, dress, result)
        if on_picture(start + len(batch), len(tasks)):
            break
    return result


def _caption(
    batch: Sequence[Task],
    captioner: Captioner,
    dress: Callable[[str], str],
    result: Captioned,
) -> None:
    """Caption and write a batch, and note it in `result`."""
    pictures: list[tuple[Task, Image.Image]] = []
    for task in batch:
        try:
            pictures.append((task, read_image(task.picture)))
        except UnreadableImage as error:
            result.left_out.append((task.picture, str(error)))
    captions = captioner.captions([picture for _, picture in pictures]) if pictures else []
    for (task, _), caption in zip(pictures, captions, strict=True):
        if not caption:
            result.left_out.append((task.picture, "gave the model nothing to say"))
            continue
        with durable.staged(task.target, task.replaces) as sibling:
            sibling.write_text(dress(caption) + "\n", encoding="utf-8")
        result.written.append(task.target)
