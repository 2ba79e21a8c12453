"""How the parts of a base model are built, found without loading it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_sd.base_files import WEIGHTS, NotHere, open_base
from lora_sd.base_files.configs import config_file
from lora_sd.base_files.vae import choose_vae
from lora_sd.data.report.base_facts import family_by_name
from lora_sd.errors import BaseModelError
from lora_sd.known_bases import EMBEDDED, PUBLISHED, published_configs


@dataclass(frozen=True)
class BaseConfigs:
    """`configs` by component; `is_here` whether its weights are on this machine; `notice` a
    sentence, where its kind is a guess."""

    name: str
    configs: Mapping[str, Mapping[str, Any]]
    is_here: bool
    notice: str = ""


def base_configs(model: str, vae: str | None = None) -> BaseConfigs:
    """Of a base model as `base.model` names it, or of a family: 'sd15', 'sd21', 'sdxl'. A model of
    the hub that is not on this machine is taken for one of the family that its name tells of.

    Args:
        vae: another VAE, as `base.vae` names it.

    Raises:
        BaseModelError: it is not there, or no Stable Diffusion.
    """
    if model in PUBLISHED:
        return BaseConfigs(model, published_configs(model), is_here=False)
    if model in EMBEDDED and vae is None:
        return BaseConfigs(model, _of_folder(model), is_here=True)
    try:
        files = open_base(model)
        files.check_configs()
    except NotHere:
        family = family_by_name(model)
        notice = (
            f"The base model '{model}' is not on this machine yet. Going by its name, it was "
            f"taken for {family}; base.model {' or '.join(PUBLISHED)} says it for sure."
        )
        return BaseConfigs(model, published_configs(family), is_here=False, notice=notice)
    except BaseModelError as error:
        hint = f"To plan without it, name its family: {', '.join(PUBLISHED)}."
        raise BaseModelError([*error.problems, hint]) from None
    configs = {part: files.config(part) for part in WEIGHTS if files.has_component(part)}
    if vae is not None:
        configs["vae"] = choose_vae(files, configs.get("vae", {}), vae)[1]
    if not configs.get("vae"):
        raise BaseModelError(f"The base model '{model}' holds no VAE: name one with base.vae.")
    return BaseConfigs(model, configs, is_here=True)


def _of_folder(model: str) -> dict[str, dict[str, Any]]:
    files = {part: EMBEDDED[model] / config_file(part) for part in WEIGHTS}
    return {
        part: json.loads(path.read_text(encoding="utf-8"))
        for part, path in files.items()
        if path.is_file()
    }
