"""Several adapters made into one.

Exact where it can be: the sum of low-rank updates is the product of their factors side by side,

    sum_i s_i up_i down_i = [c_1 up_1, c_2 up_2, ...] @ [down_1; down_2; ...],

with c_i = s_i / s for the one scaling s = alpha / rank of the result. Each scale s_i = scale_i *
alpha_i / rank_i enters once, in up, so that it may be negative.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.low_rank import (
    KINDS,
    RankLimit,
    TruncationError,
    from_delta,
    kind_of,
    svd,
    truncated,
)
from lora_sd.errors import AdapterError, shown_list
from lora_sd.parts import Scales

MOST_FOLDERS, MOST_TAGS = 50, 500  # of a merged file: a header has limits
Part = tuple[LoRAWeights, float]  # a layer of one adapter and its scale
SHARED_KEYS = (
    *("ss_base_model_version", "ss_v2", "ss_sd_model_name", "ss_sd_model_hash", "ss_clip_skip"),
    *("modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation"),
    *("modelspec.resolution", "modelspec.prediction_type"),
)
"""Metadata that stays when all adapters that have it agree."""


@dataclass(frozen=True)
class Ingredient:
    """One of the adapters, how strongly each of its parts acts, and what to call it."""

    adapter: Adapter
    scales: Scales = field(default_factory=Scales)
    name: str = "adapter"


def combine(
    ingredients: Sequence[Ingredient],
    limit: RankLimit = RankLimit(),  # noqa: B008 - it is frozen
    read_base: Callable[[str], Tensor] | None = None,
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> tuple[Adapter, TruncationError]:
    """One adapter whose update is the sum of the ingredients', and what the limit cost of it.

    Args:
        limit: none: exact, each layer's rank the sum of its ingredients' (but never above what its
            weight allows). Otherwise the best approximation of the sum within the limit.
        read_base: a layer's full name -> its base weight: what DoRA layers need, unless they stand
            alone at scale 1.
        watch: wraps the walk over the layers, to show progress.

    Raises:
        AdapterError: adapters of different models, DoRA layers without a base or a limit, or
            nothing left because every scale is 0.
    """
    layers = _parts_by_layer(ingredients)
    if not layers:
        raise AdapterError("Nothing is left to combine: every layer has the scale 0.")
    _check_shapes(layers)
    _check_dora(layers, limit, read_base)
    alphas = _alphas(layers, limit)
    error = TruncationError.none()
    result: dict[str, LoRAWeights] = {}
    for name in watch(layers):
        parts = layers[name]
        kind = kind_of(name, parts[0][0].weight_shape)
        rank_of = functools.partial(limit.of, kind)
        if _needs_base(parts):
            assert read_base is not None  # _check_dora has seen to it
            layer, values = _dense_sum(parts, read_base(name), alphas[kind], rank_of)
            error.add(kind, values, layer.rank)
        else:
            layer = side_by_side(parts, alphas[kind])
            if not limit.is_none or layer.rank > min(layer.down[0].numel(), len(layer.up)):
                known = svd(layer)
                layer = truncated(layer, rank_of(known.values), known)
                error.add(kind, known.values, layer.rank)
        result[name] = layer
    return Adapter(result, combined_metadata(ingredients)), error


def side_by_side(parts: Sequence[Part], alpha: float) -> LoRAWeights:
    """The exact sum of several updates, in float32, with the given alpha. A magnitude of the first
    is kept: it is right where the first stands alone."""
    first = parts[0][0]
    rank = sum(layer.rank for layer, _ in parts)
    scaling = alpha / rank
    factors = [(layer, scale * layer.scaling / scaling) for layer, scale in parts]
    biases = [c * layer.up_bias.float() for layer, c in factors if layer.up_bias is not None]
    return replace(
        first,
        up=torch.cat([c * layer.up.float() for layer, c in factors], dim=1),
        down=torch.cat([layer.down.float() for layer, _ in factors]),
        alpha=alpha,
        up_bias=torch.stack(biases).sum(0) if biases else None,
    )


def _dense_sum(
    parts: Sequence[Part], base: Tensor, alpha: float, rank_of: Callable[[Tensor], int]
) -> tuple[LoRAWeights, Tensor]:
    """(best approximation, all singular values) of a sum with DoRA layers in it, whose updates are
    of full rank."""
    delta = torch.stack([scale * layer.delta(base) for layer, scale in parts]).sum(0)
    embedding = parts[0][0].embedding
    layer, values = from_delta(delta.T if embedding else delta, alpha, rank_of)
    biases = [scale * bias for part, scale in parts if (bias := part.bias_delta()) is not None]
    up_bias = torch.stack(biases).sum(0) / layer.scaling if biases else None
    return replace(layer, embedding=embedding, up_bias=up_bias), values


def _parts_by_layer(ingredients: Sequence[Ingredient]) -> dict[str, list[Part]]:
    """Every layer's parts with a scale above or below 0, in the order of the ingredients."""
    layers: dict[str, list[Part]] = {}
    for ingredient in ingredients:
        for name, layer in ingredient.adapter.layers.items():
            scale = ingredient.scales.of(name, layer.weight_shape)
            if scale:
                layers.setdefault(name, []).append((layer, scale))
    return layers


def _check_shapes(layers: Mapping[str, Sequence[Part]]) -> None:
    for name, parts in layers.items():
        shapes = {tuple(layer.weight_shape) for layer, _ in parts}
        if len(shapes) > 1:
            found = " and ".join(map(str, sorted(shapes)))
            raise AdapterError(
                f"The adapters were made for different models: '{name}' is {found} in them."
            )
        if any(layer.up.shape[1] != layer.rank for layer, _ in parts):
            raise AdapterError(f"'{name}' is a grouped convolution; these cannot be combined.")


def _check_dora(
    layers: Mapping[str, Sequence[Part]], limit: RankLimit, read_base: object | None
) -> None:
    names = [name for name, parts in layers.items() if _needs_base(parts)]
    if names and (read_base is None or limit.is_none):
        raise AdapterError(
            f"{len(names)} layers have a DoRA magnitude, such as {shown_list(names, 1)}: what they "
            "add depends on the base weights, so that they are combined exactly only where they "
            "stand alone at scale 1. Give the base model's weights (--base and its folder or file, "
            "not its family) and a rank (--rank) or a share of the energy (--energy) for the best "
            "approximation."
        )


def _needs_base(parts: Sequence[Part]) -> bool:
    alone = len(parts) == 1 and parts[0][1] == 1
    return not alone and any(layer.magnitude is not None for layer, _ in parts)


def _alphas(layers: Mapping[str, Sequence[Part]], limit: RankLimit) -> dict[str, float]:
    """One alpha for each kind of layer, the highest rank among them: diffusers scales minority
    alphas of attention layers wrongly."""
    alphas = dict.fromkeys(KINDS, 1.0)
    for name, parts in layers.items():
        kind = kind_of(name, parts[0][0].weight_shape)
        highest = sum(layer.rank for layer, _ in parts)
        alphas[kind] = max(alphas[kind], float(limit.capped(kind, highest)))
    return alphas


def combined_metadata(ingredients: Sequence[Ingredient]) -> dict[str, str]:
    """What the result says of itself: the keys of SHARED_KEYS that the ingredients agree on, their
    trigger phrases and tag counts together, and under 'lora_sd.combined' what it was made of."""
    sources = [ingredient.adapter.metadata for ingredient in ingredients]
    metadata = {}
    for key in SHARED_KEYS:
        values = {source[key] for source in sources if key in source}
        if len(values) == 1:
            metadata[key] = values.pop()
    phrases = [source.get("modelspec.trigger_phrase", "") for source in sources]
    if any(phrases):
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(filter(None, phrases)))
    tags = _tag_frequency(sources)
    if tags:
        metadata["ss_tag_frequency"] = json.dumps(tags)
    metadata["modelspec.title"] = " + ".join(
        f"{ingredient.name} x {ingredient.scales.overall:g}" for ingredient in ingredients
    )
    metadata["lora_sd.combined"] = json.dumps([_recipe(part) for part in ingredients])
    return metadata


def _recipe(ingredient: Ingredient) -> dict[str, object]:
    scales = ingredient.scales
    return {
        "name": ingredient.name,
        "hash": ingredient.adapter.metadata.get("sshs_model_hash"),
        "scale": scales.overall,
        "linear": scales.linear,
        "conv": scales.conv,
        "text_encoder": scales.text_encoder,
        "blocks": dict(scales.blocks),
    }


def _tag_frequency(sources: Iterable[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """kohya's {folder: {tag: count}} of all of them, counts added; damaged ones are left out."""
    merged: dict[str, dict[str, int]] = {}
    for source in sources:
        try:
            folders = json.loads(source.get("ss_tag_frequency", "{}"))
            for folder, tags in folders.items():
                own = merged.setdefault(str(folder), {})
                for tag, count in tags.items():
                    own[str(tag)] = own.get(str(tag), 0) + int(count)
        except (ValueError, AttributeError, TypeError):
            continue
    kept: dict[str, dict[str, int]] = {}
    for folder in list(merged)[:MOST_FOLDERS]:
        kept[folder] = dict(Counter(merged[folder]).most_common(MOST_TAGS))
    return kept
