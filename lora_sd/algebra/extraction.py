"""An adapter of what a fine-tuned model has more than its base.

Each layer's difference is a matrix, and its best approximation of a rank is its truncated singular
value decomposition. Layers are read one at a time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lora_sd.adapter import Adapter
from lora_sd.algebra.low_rank import RankLimit, TruncationError, from_delta, kind_of
from lora_sd.base_files import BaseFiles
from lora_sd.base_files.metadata import adapter_metadata
from lora_sd.errors import AdapterError, BaseModelError, shown_list
from lora_sd.parts import TEXT_ENCODERS, TOKENS, component_of


@dataclass
class Extraction:
    """An adapter, and how well it stands for the difference.

    Attributes:
        errors: relative Frobenius error of each layer, 0..1.
        error: of all layers together.
        unchanged: layers that are the same in both models, or nearly (`threshold`).
        left_over: tensors that differ, but have no place in an adapter: biases, norms, token and
            position tables, the VAE.
        unmatched: text-encoder layers that only one of the two models has.
    """

    adapter: Adapter
    errors: dict[str, float] = field(default_factory=dict)
    error: TruncationError = field(default_factory=TruncationError.none)
    unchanged: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def extract(
    tuned: BaseFiles,
    base: BaseFiles,
    rank: int,
    conv_rank: int | None = None,
    energy: float | None = None,
    text_encoders: bool = True,
    threshold: float = 0.0,
    watch: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> Extraction:
    """The adapter that best turns `base` into `tuned`, with alpha = rank in every layer.

    A layer that allows a lower rank only has that, with the same alpha.

    Args:
        rank, conv_rank: the highest for linear layers and for convolutions (None: as `rank`).
        energy: share (0..1) of each layer's energy to keep within that; None: the whole rank.
        threshold: a layer whose difference is at most this share of its weight (Frobenius norms)
            counts as unchanged; 0: only one that is exactly the same.
        watch: wraps the walk over the layers, to show progress.

    Raises:
        BaseModelError: the two are models of different kinds.
        AdapterError: nothing differs.
    """
    names, unmatched = _common_layers(tuned, base, text_encoders)
    limit = RankLimit(rank, conv_rank, energy)
    found = Extraction(Adapter({}, adapter_metadata(base)), unmatched=unmatched)
    for name in watch(names):
        delta = difference(tuned.read(name), base.read(name), threshold)
        if delta is None:
            found.unchanged.append(name)
            continue
        kind = kind_of(name, delta.shape)
        alpha = float(conv_rank or rank) if kind == "conv" else float(rank)
        layer, values = from_delta(delta, alpha, partial(limit.of, kind))
        found.adapter.layers[name] = layer
        found.error.add(kind, values, layer.rank)
        found.errors[name] = float(values[layer.rank :].norm() / values.norm())
    if not found.adapter.layers:
        raise AdapterError(
            f"'{tuned.name}' and '{base.name}' do not differ in any of their {len(names)} layers: "
            f"there is nothing to extract."
        )
    found.left_over = _left_over(tuned, base, set(names), text_encoders)
    return found


def difference(tuned: Tensor, base: Tensor, threshold: float) -> Tensor | None:
    """tuned - base in float32; None when they are the same but for rounding to the coarser of
    their dtypes, or differ by no more than `threshold` * |base|."""
    if same(tuned, base):
        return None
    delta = tuned.float() - base.float()
    if not torch.isfinite(delta).all():
        raise BaseModelError("A weight holds values that are not finite numbers.")
    return delta if delta.norm() > threshold * base.float().norm() else None


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, or would be in the coarser of their dtypes."""
    coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarser), other.to(coarser))


def _common_layers(
    tuned: BaseFiles, base: BaseFiles, text_encoders: bool
) -> tuple[list[str], list[str]]:
    """(layers that both have, text-encoder layers that one has), refusing different UNets."""
    different = [
        name
        for name in {**base.shapes, **tuned.shapes}
        if base.shapes.get(name) != tuned.shapes.get(name)
    ]
    wrong = [
        name
        for name in different
        if name.startswith("unet.") or (name in base.shapes and name in tuned.shapes)
    ]
    if wrong:
        raise BaseModelError(
            f"'{tuned.name}' is no fine-tuned '{base.name}': {len(wrong)} layers differ in shape "
            f"or are in one only, such as {shown_list(wrong, 2)}."
        )
    names = [
        name
        for name in base.shapes
        if name not in different
        and (text_encoders or component_of(name) not in TEXT_ENCODERS)
        and not name.endswith(TOKENS)  # kohya's format has no place for it
    ]
    return names, different if text_encoders else []


def _left_over(
    tuned: BaseFiles, base: BaseFiles, layers: set[str], text_encoders: bool
) -> list[str]:
    """Tensors of both that differ and are no weights of these layers."""
    names = [
        name
        for name, shape in base.tensor_shapes.items()
        if tuned.tensor_shapes.get(name) == shape
        and base.dtype(name).is_floating_point
        and (text_encoders or component_of(name) not in TEXT_ENCODERS)
        and name.removesuffix(".weight") not in layers
    ]
    return [name for name in names if not same(tuned.tensor(name), base.tensor(name))]
