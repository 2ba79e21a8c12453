"""Open another VAE for a base model: a single file, or a diffusers folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_sd.base_files import configs, pickles
from lora_sd.base_files.files import WEIGHTS, BaseFiles, Entry
from lora_sd.base_files.folder import canonical_key, folder_entries, only_pickled
from lora_sd.base_files.original import VAE, Piece, from_original
from lora_sd.base_files.tensor_stream import read_header
from lora_sd.errors import BaseModelError

SCALING_FACTOR = 0.18215  # of a config that names none
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def open_vae(name: str) -> tuple[BaseFiles, dict[str, Any]]:
    """(its tensors, named 'vae....', its config; {} where a single file has none).

    Args:
        name: a `.safetensors` file: of a VAE, in the original layout or diffusers', or of a whole
            checkpoint; or a diffusers folder: of a VAE, or of a whole model.

    Raises:
        BaseModelError: not there, damaged, pickled, or no VAE.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return _open_folder(name, path)
    if not path.is_file():
        raise BaseModelError(f"There is no VAE '{name}': it is no file and no folder.")
    if pickles.is_pickle(path):
        raise pickles.refusal(name, [path])
    stored, metadata = read_header(path)
    by_key = {one.key: one for one in stored}
    bare = not any(key.startswith(VAE) for key in by_key)
    kept = {f"{VAE * bare}{key}": one for key, one in by_key.items()}
    if bare and any(".down_blocks." in key for key in by_key):
        entries = [
            Entry(one, Piece(key, (f"vae.{canonical_key('vae', key)}",)))
            for key, one in by_key.items()
            if key.startswith(PARTS)
        ]
    else:
        pieces, _ = from_original({key: one.shape for key, one in kept.items()})
        entries = [Entry(kept[piece.key], piece) for piece in pieces if piece.key.startswith(VAE)]
    if not entries:
        raise BaseModelError(f"'{name}' is not a VAE: it has no 'encoder...' and 'decoder...'.")
    return BaseFiles(name, path, entries, [], metadata), {}


def _open_folder(name: str, path: Path) -> tuple[BaseFiles, dict[str, Any]]:
    folder = path / "vae" if (path / "vae").is_dir() else path
    if not (folder / "config.json").is_file():
        raise BaseModelError(
            f"'{name}' is not a VAE's folder: it holds neither config.json nor a folder 'vae'."
        )
    config = configs.read_json(folder / "config.json")
    kind = config.get("_class_name", "AutoencoderKL")
    if kind != "AutoencoderKL":
        raise BaseModelError(f"'{name}' is a {kind}, not the kind of VAE that base models have.")
    if pickle := only_pickled(folder, WEIGHTS["vae"]):
        raise pickles.refusal(name, [pickle])
    return BaseFiles(name, path, folder_entries("vae", folder), [], {}), config


def choose_vae(
    files: BaseFiles, config: dict[str, Any], other: str | None
) -> tuple[BaseFiles, dict[str, Any]]:
    """(the VAE's files, its config): the model's own, or another one, which must fit it.

    Raises:
        BaseModelError: the other cannot be opened, or its latents are not what the UNet knows.
    """
    if other is None:
        return files, config
    source, own_config = open_vae(other)
    if own_config:
        _check_fits(other, own_config, files.name, config)
    return source, own_config or config


def _check_fits(
    vae: str, config: Mapping[str, Any], base: str, base_config: Mapping[str, Any]
) -> None:
    def facts(of: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "scaling_factor": of.get("scaling_factor", SCALING_FACTOR),
            "shift_factor": of.get("shift_factor"),
            "latent_channels": of.get("latent_channels", 4),
            "number of blocks": len(of.get("block_out_channels", [64])),
        }

    found, wanted = facts(config), facts(base_config)
    wrong = [f"{key} {found[key]} instead of {wanted[key]}" for key in found
             if found[key] != wanted[key]]  # fmt: skip
    if wrong:
        raise BaseModelError(
            f"The VAE '{vae}' is made for another kind of model than '{base}': {', '.join(wrong)}."
        )
