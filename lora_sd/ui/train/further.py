"""What the form has beside the settings of one data set: more data sets, pictures for validation
and regularisation, prompts with options. Each becomes a folder of `data.folders`, or a file."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sd import durable
from lora_sd.errors import ConfigError
from lora_sd.ui import fields
from lora_sd.ui.data import pictures
from lora_sd.ui.launch import DATASETS
from lora_sd.ui.texts import say
from lora_sd.ui.workplace import Workplace

MORE, VALIDATION, REGULARISATION = "sets.more", "sets.validation", "sets.regularisation"
CLASS_CAPTION, CLASS_PICTURES = "sets.class_caption", "sets.class_pictures"
PRIOR_WEIGHT = "sets.prior_weight"
DRAWN = "drawn"
"""As regularisation pictures: the base draws them."""
FIRST: Mapping[str, Any] = {
    MORE: [],
    VALIDATION: "",
    REGULARISATION: "",
    CLASS_CAPTION: "",
    CLASS_PICTURES: 100,
    PRIOR_WEIGHT: 1.0,
}
"""The parts by name, and what they hold first."""
MOST_CLASS_PICTURES = 10_000


def further_folders(place: Workplace, form: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """What a part adds to `data.folders`.

    Raises:
        UserError: it cannot be used.
    """

    def path(chosen: object) -> str:
        return str(pictures.find_folder(place.outputs, place.pictures, chosen).path)

    chosen = form.get(part)
    if part == MORE:
        ids = several(chosen)
        return [{"folder": path(one)} for one in ids if one != form.get("data.folder")]
    if not chosen:
        return []
    if part == VALIDATION:
        return [{"folder": path(chosen), "kind": "validation"}]
    weight = _number(form, PRIOR_WEIGHT, 0, 100)
    regular = {"kind": "regularisation", "loss_weight": weight}
    if chosen != DRAWN:
        return [{"folder": path(chosen), **regular}]
    caption = form.get(CLASS_CAPTION)
    if not isinstance(caption, str) or not caption.strip() or len(caption) > pictures.MOST_CAPTION:
        raise ConfigError(say("train.wants_caption", name=fields.label(CLASS_CAPTION)))
    count = int(_number(form, CLASS_PICTURES, 1, MOST_CLASS_PICTURES))
    drawn_by = f"{caption}\n{form.get('base.model')}\n{form.get('data.resolution_px')}"
    words = re.sub(r"[^A-Za-z0-9]+", "-", caption).strip("-")[:32]
    folder = place.outputs / DATASETS / f"class-{words}-{_digest(drawn_by)[:6]}"
    drawn = {"folder": str(folder), "caption": caption.strip(), "class_pictures": count}
    return [{**drawn, **regular}]


def prompt_file(outputs: Path, text: object) -> Path | None:
    """Prompts with options as a file for the trainer; None for none.

    Raises:
        ConfigError: lines that cannot be used.
    """
    if not isinstance(text, str) or not text.strip():
        return None
    from lora_sd.generate import PictureSettings
    from lora_sd.sample_prompts import parse_prompt

    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            _, wrong = parse_prompt(line.strip(), PictureSettings(""), size_step_px=1)
            problems += [say("train.prompt_line", number=number, wrong=one) for one in wrong]
    if problems:
        raise ConfigError(problems)
    file = outputs / ".app" / "prompts" / f"{_digest(text)[:16]}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(file, text)
    return file


def several(value: object) -> list[str]:
    """The ids of a choice of several."""
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []


def _number(form: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value: Any = form.get(name)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # which NaN is not, either
        shown = {"name": fields.label(name), "low": f"{low:g}", "high": f"{high:,g}"}
        raise ConfigError(say("train.wrong_number", **shown))
    return float(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
