"""The base models and VAEs that can be chosen: by name, never by a path of the browser's."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_sd.errors import BaseModelError
from lora_sd.known_bases import EMBEDDED, HUB_ID
from lora_sd.ui.launch import PROJECT
from lora_sd.ui.texts import say

MODELS = PROJECT / "models"
"""Where checkpoints are looked for unless the app is told of another folder."""
ON_THE_HUB = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "Stable Diffusion 1.5",
    "stabilityai/stable-diffusion-xl-base-1.0": "Stable Diffusion XL 1.0",
}
DEEPEST = 3  # folders below the folder of models


@dataclass(frozen=True)
class OfferedBase:
    """A base model by the name the page knows it under, and as `base.model` names it."""

    id: str
    label: str
    model: str


def offered_bases(models: Path) -> list[OfferedBase]:
    """The embedded base, those of the folder of models, then two of Hugging Face's hub."""
    embedded = [OfferedBase(one, say("fields.base.embedded", name=one), one) for one in EMBEDDED]
    hub = [
        OfferedBase(one, say("fields.base.hub", name=name), one) for one, name in ON_THE_HUB.items()
    ]
    here = [OfferedBase(name, name, str(path)) for name, path in _found(models, "model_index.json")]
    return [*embedded, *here, *hub]


def find_base(models: Path, base_id: object) -> str:
    """What `base.model` is to be for an offered base, or for another of the hub.

    Raises:
        BaseModelError: neither.
    """
    for base in offered_bases(models):
        if base.id == base_id:
            return base.model
    is_of_hub = isinstance(base_id, str) and HUB_ID.fullmatch(base_id.strip())
    if is_of_hub and not Path(str(base_id).strip()).exists():  # else it were a path
        return str(base_id).strip()
    raise BaseModelError(say("fields.base.unknown", name=str(base_id)[:80], folder=models.name))


def offered_vaes(models: Path) -> list[str]:
    """The VAEs of the folder of models, by name."""
    return [name for name, _ in _found(models, "config.json")]


def find_vae(models: Path, vae_id: object) -> str | None:
    """What `base.vae` is to be for an offered VAE; None for none.

    Raises:
        BaseModelError: it is not offered.
    """
    if not vae_id:
        return None
    for name, path in _found(models, "config.json"):
        if name == vae_id:
            return str(path)
    raise BaseModelError(say("fields.base.unknown_vae", name=str(vae_id)[:80], folder=models.name))


def _found(root: Path, marker: str, below: str = "", depth: int = 1) -> Iterator[tuple[str, Path]]:
    """(name, path) of every checkpoint, and of every folder that holds `marker`."""
    try:
        paths = sorted((root / below).iterdir())
    except OSError:
        return
    for path in paths:
        name = f"{below}{path.name}"
        if path.name.startswith("."):
            continue
        if path.suffix.lower() == ".safetensors" or (path / marker).is_file():
            yield name, path
        elif path.is_dir() and depth < DEEPEST and not (path / "model_index.json").is_file():
            yield from _found(root, marker, f"{name}/", depth + 1)
