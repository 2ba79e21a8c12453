"""alpha of each layer as PEFT's LoraConfig gives it: diffusers' files hold no alphas of their own.

In a diffusers file the config is the metadata's `lora_adapter_metadata`; beside the files that PEFT
itself writes, `adapter_model*.safetensors`, it is `adapter_config.json`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_sd.errors import AdapterError
from lora_sd.formats.diffusers import CONFIG_KEY

MOST_CONFIG_BYTES = 2**20
OF_PEFT = re.compile(r"adapter_model.*\.safetensors")
PLAIN = re.compile(r"[\w.\-]+")
SAFE = re.compile(r"(?:[^*+?{]|\)\?)*(?:[*+](?:[^*+?{]|\)\?)*){0,2}")
MOST_EXPRESSIONS = 100


class PeftAlphas:
    """What the config inside a file, or beside it, says of its layers.

    Args:
        metadata: the file's.
        path: the file.

    Raises:
        AdapterError: the config is damaged.
    """

    def __init__(self, metadata: Mapping[str, str], path: Path) -> None:
        self._path = path
        self._config = self._read(metadata.get(CONFIG_KEY))
        self._patterns: dict[str, AlphaPatterns] = {}

    def of(self, name: str, rank: int) -> float | None:
        """alpha of a layer, by its full name and rank; None when the config does not tell.

        Rank-stabilised scaling is folded into it.

        Raises:
            AdapterError: the config is damaged.
        """
        component, _, path = name.partition(".")
        fields = self._fields(component)
        if "lora_alpha" not in fields:
            return None
        try:
            if component not in self._patterns:
                self._patterns[component] = AlphaPatterns(fields.get("alpha_pattern") or {})
            alpha = self._patterns[component].find(path)
            alpha = _positive(fields["lora_alpha"]) if alpha is None else alpha
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise self._damaged(str(error)) from None
        return alpha * math.sqrt(rank) if fields.get("use_rslora") else alpha

    def _fields(self, component: str) -> dict[str, Any]:
        """The config's fields for a component; a config without components is for all of them."""
        start = f"{component}."
        mine = {k.removeprefix(start): v for k, v in self._config.items() if k.startswith(start)}
        return mine or self._config

    def _read(self, text: str | None) -> dict[str, Any]:
        beside = self._path.with_name("adapter_config.json")
        is_peft = OF_PEFT.fullmatch(self._path.name) is not None and beside.is_file()
        try:
            if text is None and is_peft and beside.stat().st_size < MOST_CONFIG_BYTES:
                text = beside.read_text(encoding="utf-8")
            config = json.loads(text or "{}")
        except (OSError, ValueError, RecursionError):
            raise self._damaged("it is not valid JSON") from None
        if not isinstance(config, dict):
            raise self._damaged("it is not an object")
        return config

    def _damaged(self, why: str) -> AdapterError:
        return AdapterError(f"'{self._path}' has a damaged {CONFIG_KEY}: {why[:200]}.")


class AlphaPatterns:
    """PEFT's `alpha_pattern`: regular expressions for the ends of paths, the first one counts.

    A file may come from anywhere, so expressions that could take for ever are refused; names and
    endings, which nearly all are, are looked up and never run.

    Raises:
        ValueError: a pattern is too complicated, or an alpha is not a number above 0.
    """

    def __init__(self, alphas: Mapping[str, Any]) -> None:
        self._whole: dict[str, tuple[int, float]] = {}
        self._endings: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], float]] = []
        for order, (pattern, said) in enumerate(alphas.items()):
            alpha = _positive(said)
            anchored = pattern.startswith("^")
            text = pattern.removeprefix("^").removeprefix(r"(?:text_model\.)?").replace(r"\.", ".")
            if PLAIN.fullmatch(text):
                known = self._whole if anchored else self._endings
                known.setdefault(text.removeprefix("text_model."), (order, alpha))
            elif len(pattern) > 200 or not SAFE.fullmatch(pattern):
                raise ValueError(f"its pattern '{pattern[:60]}' is too complicated")
            else:
                expression = re.compile(rf"(.*\.)?({pattern})$")
                self._expressions.append((order, expression, alpha))
        if len(self._expressions) > MOST_EXPRESSIONS:
            raise ValueError(f"it has {len(self._expressions)} regular expressions")

    def find(self, path: str) -> float | None:
        """alpha of the first pattern that fits a path, with or without 'text_model.'."""
        return min(self._fitting(path), default=(0, None), key=lambda found: found[0])[1]

    def _fitting(self, path: str) -> Iterator[tuple[int, float]]:
        short = path.removeprefix("text_model.")
        if short in self._whole:
            yield self._whole[short]
        parts = short.split(".")
        for start in range(len(parts)):
            ending = ".".join(parts[start:])
            if ending in self._endings:
                yield self._endings[ending]
        for order, expression, alpha in self._expressions:
            if expression.match(path) or expression.match(short):
                yield order, alpha


def _positive(value: Any) -> float:
    """A number above 0; ValueError for anything else."""
    alpha = float(value)
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha is {alpha:g}; it must be above 0")
    return alpha
