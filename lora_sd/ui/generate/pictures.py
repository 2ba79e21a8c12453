"""Pictures that carry what they were made with, and its way back into the form."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lora_sd.errors import ConfigError
from lora_sd.ui.adapters.offered import OfferedAdapter
from lora_sd.ui.generate import request as requests
from lora_sd.ui.generate.request import MOST_ADAPTERS, PARTS, Request
from lora_sd.ui.texts import say

NOTE = "lora_sd"  # of the PNG's text chunks, as in the samples of a run
MOST_FILE = 50 * 2**20  # bytes
LONGEST_NAME = 80
FORM = {  # field of the form: its name in the note
    "prompt": "prompt", "negative": "negative_prompt", "seed": "seed", "steps": "steps",
    "guidance": "guidance", "width": "width_px", "height": "height_px", "scheduler": "scheduler",
    "base": "base",
}  # fmt: skip


def note_of(request: Request) -> dict[str, Any]:
    """The settings of a request, for the PNG's text; no path is among them."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "width_px": request.width_px,
        "height_px": request.height_px,
        "scheduler": request.scheduler,
        "base": request.base_id,
        "adapters": [
            {"adapter": one.adapter.id, "scale": one.scale}
            | {part: getattr(one, part) for part in PARTS if getattr(one, part) != 1}
            for one in request.used
        ],
    }


def signed(picture: Image.Image, request: Request) -> Image.Image:
    """A copy that holds the settings, which Gradio and `keep` write into the PNG."""
    copy = picture.copy()
    copy.info |= {"prompt": request.prompt, NOTE: json.dumps(note_of(request))}
    return copy


def keep(picture: Image.Image) -> Path:
    """Write a signed picture into Gradio's own folder, which is cleaned after a day."""
    info = PngInfo()
    for key in (NOTE, "prompt"):
        info.add_itxt(key, picture.info[key])
    data = io.BytesIO()
    picture.save(
        data, "PNG", pnginfo=info, compress_level=1
    )  # a quarter larger, in a fifth of the time
    name = hashlib.sha256(data.getvalue()).hexdigest()[:24]
    folder = Path(os.environ["GRADIO_TEMP_DIR"]) / "pictures" / name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "picture.png"
    file.write_bytes(data.getvalue())
    return file


def read_note(file: Path) -> dict[str, Any]:
    """The settings in a PNG, as they stand there.

    Raises:
        ConfigError: it holds none.
    """
    try:
        if file.stat().st_size > MOST_FILE:
            raise ValueError
        with Image.open(file, formats=["PNG"]) as picture:
            note = json.loads(picture.info[NOTE])
        if not isinstance(note, dict):
            raise ValueError
        return note
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, RecursionError):
        raise ConfigError(say("generate.no_note")) from None


@dataclass(frozen=True)
class Restored:
    """Values for the form by field name, and sentences on what could not be brought back."""

    values: dict[str, Any]
    notices: list[str] = field(default_factory=list)


def restore(note: Mapping[str, Any], find: Callable[[object], OfferedAdapter | None]) -> Restored:
    """Form values of a note, which may come from anywhere: they are checked as the form's are.

    Raises:
        ConfigError: the form would not take them.
    """
    values = {key: note[name] for key, name in FORM.items() if name in note}
    values["count"] = 1
    used = note.get("adapters")
    if used is None and note.get("adapter"):  # of a run's sample
        used = [{"adapter": note["adapter"], "scale": note.get("scale", 1.0)}]
    rows, notices = [], []
    for one in used[:MOST_ADAPTERS] if isinstance(used, list) else []:
        known = one if isinstance(one, dict) else {}
        if find(known.get("adapter")):
            rows.append(known)
        else:
            name = str(known.get("adapter"))[:LONGEST_NAME]
            notices.append(say("generate.note_adapter_gone", adapter=name))
    for number in range(1, MOST_ADAPTERS + 1):
        row = rows[number - 1] if number <= len(rows) else {}
        values[requests.field("adapter", number)] = row.get("adapter")
        for key in ("scale", *PARTS):
            values[requests.field(key, number)] = row.get(key, 1.0)
    checking = requests.Checking(values)
    requests.read_picture(checking)
    if rows:
        requests.read_adapters(checking, find)
    if checking.problems:
        raise ConfigError(say("generate.bad_note", why=" ".join(checking.problems)))
    return Restored(values, notices)


def of_each(request: Request) -> list[Request]:
    """A request for each of its pictures."""
    return [
        replace(request, seed=request.seed + number, count=1) for number in range(request.count)
    ]
