"""Find and open a base model's files, and check that they are a Stable Diffusion's."""

import os
from pathlib import Path

from lora_sd.base_files import configs, foreign, pickles
from lora_sd.base_files.files import WEIGHTS, BaseFiles, Entry
from lora_sd.base_files.folder import folder_entries, only_pickled
from lora_sd.base_files.original import UNET, from_original
from lora_sd.base_files.tensor_stream import read_header
from lora_sd.errors import BaseModelError, shown_list
from lora_sd.known_bases import EMBEDDED, HUB_ID


class NotHere(BaseModelError):
    """A model of the hub that is not on this machine, or in part only."""


def open_base(name: str) -> BaseFiles:
    """Open a base model's files and check that they are a text-to-image Stable Diffusion's.

    Args:
        name: 'tiny-sd', the path of a diffusers folder, or of a `.safetensors` checkpoint in the
            original layout, or the hub id of a model in Hugging Face's cache on this machine;
            nothing is fetched. Of a folder's variants the plain one is taken, else the one there
            is.

    Raises:
        NotHere: a hub's model that is to be fetched first.
        BaseModelError: not there, damaged, pickled, or something else than such a model.
    """
    path = EMBEDDED.get(name, Path(os.path.expanduser(name)))
    try:
        path.stat()
    except FileNotFoundError:
        return _open_cached(name)
    except (OSError, ValueError) as error:  # too long a name, no right to look, a null character
        reason = getattr(error, "strerror", None) or error
        raise BaseModelError(f"The base model '{name}' cannot be opened: {reason}.") from None
    if path.is_dir():
        return open_folder(name, path)
    if pickles.is_pickle(path):
        raise pickles.refusal(name, [path])
    return _open_single_file(name, path)


def _open_cached(hub_id: str) -> BaseFiles:
    """Open a hub id's model in Hugging Face's cache; the network is not asked."""
    if not HUB_ID.fullmatch(hub_id):
        raise BaseModelError(
            f"There is no base model '{hub_id}'. Name a diffusers folder, a .safetensors "
            f"checkpoint, or {shown_list(list(EMBEDDED))}."
        )
    # Slow to import, and only wanted here.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        index = try_to_load_from_cache(hub_id, "model_index.json")
    except HFValidationError:
        index = None
    if not isinstance(index, str):
        raise NotHere(
            f"There is no base model '{hub_id}' on this machine yet: it is no path, and is not in "
            f"Hugging Face's cache. The first training with it fetches a model of the hub."
        )
    try:
        base = open_folder(hub_id, Path(index).parent)
        if missing := base.missing_configs():
            raise BaseModelError(f"{shown_list(missing)} is missing.")
        return base
    except BaseModelError as error:
        raise NotHere(
            [f"The base model '{hub_id}' is on this machine in part only.", *error.problems]
        ) from None


def open_folder(name: str, path: Path) -> BaseFiles:
    """Open a diffusers folder, by its path; `name` is what the user called the model."""
    if not (path / "model_index.json").is_file():
        raise BaseModelError(
            f"'{name}' is not a diffusers folder: it holds no model_index.json. Name the folder "
            f"that does, or a .safetensors checkpoint."
        )
    index = configs.read_json(path / "model_index.json")
    foreign.check_folder(name, index)
    entries, pickled, problems = [], [], []
    for component in WEIGHTS:
        if not (index.get(component) or [None])[0]:
            continue
        folder, stem = path / component, WEIGHTS[component]
        if pickle := only_pickled(folder, stem):
            pickled.append(pickle)
            continue
        try:
            entries += folder_entries(component, folder)
        except BaseModelError as error:
            problems += error.problems
    if pickled:
        problems += pickles.refusal(name, pickled).problems
    if problems:
        raise BaseModelError(problems)
    base = BaseFiles(name, path, entries, [], {})
    foreign.check_text_to_image(name, base.tensor_shapes, [])
    return base


def _open_single_file(name: str, path: Path) -> BaseFiles:
    stored, metadata = read_header(path)
    by_key = {one.key: one for one in stored}
    pieces, rest = from_original({key: one.shape for key, one in by_key.items()})
    strange = [key for key in rest if key.startswith(UNET)]
    unet = [piece for piece in pieces if piece.key.startswith(UNET)]
    if strange or not unet:
        raise BaseModelError(f"'{name}' {foreign.foreign_file(list(by_key), bool(unet))}")
    entries = [Entry(by_key[piece.key], piece) for piece in pieces]
    base = BaseFiles(name, path, entries, [by_key[key] for key in rest], metadata)
    foreign.check_text_to_image(name, base.tensor_shapes, rest)
    return base
