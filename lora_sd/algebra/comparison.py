"""How an adapter that was read from a file differs from the one that it should be.

The updates of a layer are compared through their factors, which are thin: their difference is one
product, [up, -up'] @ [down; down'], whose Frobenius norm needs two small Gram matrices. The update
itself, as large as the base weight, is never formed for that.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.low_rank import matrices

SAME_UPDATE = 1e-5
"""Relative error below which two updates of different factors are the same."""
FOLDING = 4 * 2.0**-24
"""Relative error that float32 leaves when an alpha is folded into a factor."""


@dataclass(frozen=True)
class LayerDifference:
    """Of one layer.

    Attributes:
        error: Frobenius norm of the updates' difference over the norm of the update meant.
        why: what is wrong with it beyond the rounding to the file's precision; '' when it is right.
    """

    error: float
    why: str = ""


@dataclass
class Comparison:
    """Of two adapters, by full layer name.

    Attributes:
        layers: of the layers that both have.
        missing: layers that should be there.
        extra: layers that should not, and act; one whose update is zero does no harm.
    """

    layers: dict[str, LayerDifference] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[str]:
        """Layers that both have and that differ beyond rounding."""
        return [name for name, difference in self.layers.items() if difference.why]

    @property
    def worst(self) -> str | None:
        """The layer of the largest error."""
        return max(self.layers, key=lambda name: self.layers[name].error, default=None)

    @property
    def ok(self) -> bool:
        return not (self.wrong or self.missing or self.extra)


def compare(found: Adapter, meant: Adapter) -> Comparison:
    """Compare an adapter with the one that it should be."""
    comparison = Comparison()
    for name, layer in meant.layers.items():
        if name in found.layers:
            comparison.layers[name] = layer_difference(found.layers[name], layer)
        else:
            comparison.missing.append(name)
    for name, layer in found.layers.items():
        if name not in meant.layers and bool(layer.up.any()):
            comparison.extra.append(name)
    return comparison


def layer_difference(found: LoRAWeights, meant: LoRAWeights) -> LayerDifference:
    """Compare a layer with the one that it should be.

    It is right when its factors are the other's, rounded to its precision, with alpha folded into
    the second or not; or when its update is the same to 1e-5.
    """
    if found.weight_shape != meant.weight_shape:
        shapes = f"{tuple(found.weight_shape)} instead of {tuple(meant.weight_shape)}"
        return LayerDifference(float("inf"), f"its weight is {shapes}")
    error = relative_error(found, meant)
    why = []
    if not _same_factors(found, meant) and not error <= SAME_UPDATE:
        why.append(f"its update differs by {error:.1e} of its norm")
    bias, bias_meant = _scaled(found.up_bias, found), _scaled(meant.up_bias, meant)
    why += _part_differs("up-bias", found, bias, bias_meant)
    why += _part_differs("magnitude", found, found.magnitude, meant.magnitude)
    return LayerDifference(error, "; ".join(why))


def relative_error(found: LoRAWeights, meant: LoRAWeights) -> float:
    """Frobenius norm of the updates' difference over that of the update meant, without magnitudes;
    to about 1e-8."""
    if _is_identical(found, meant):
        return 0.0
    (up, down), (up_meant, down_meant) = _matrices(found), _matrices(meant)
    ups = torch.cat([found.scaling * up, -meant.scaling * up_meant], 1)
    grams = (ups.T @ ups) * _gram(torch.cat([down, down_meant]))
    rank = up.shape[1]
    norm = max(float(grams[rank:, rank:].sum()), 0.0) ** 0.5
    difference = max(float(grams.sum()), 0.0) ** 0.5
    return difference / norm if norm else (float("inf") if difference else 0.0)


def largest_absolute_error(found: LoRAWeights, meant: LoRAWeights) -> float:
    """The largest difference of a weight of the updates, without magnitudes; forms both updates."""
    return float((found.low_rank().cpu() - meant.low_rank().cpu()).abs().max())


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.T


def _matrices(layer: LoRAWeights) -> tuple[Tensor, Tensor]:
    """(up, down) as float64 matrices on the CPU."""
    up, down = matrices(layer)
    return up.cpu(), down.cpu()


def _is_identical(found: LoRAWeights, meant: LoRAWeights) -> bool:
    pairs = ((found.up, meant.up), (found.down, meant.down))
    return found.alpha == meant.alpha and all(
        one.shape == other.shape and torch.equal(one.cpu().float(), other.detach().cpu().float())
        for one, other in pairs
    )


def _same_factors(found: LoRAWeights, meant: LoRAWeights) -> bool:
    """Whether the factors are the other's, rounded to the file's precision."""
    if found.rank != meant.rank or found.up.shape != meant.up.shape:
        return False
    return _is_rounded(found.down, meant.down) and _is_rounded(
        found.up, meant.up.double() * (meant.scaling / found.scaling)
    )


def _is_rounded(found: Tensor, meant: Tensor) -> bool:
    """Whether every value is the other's, rounded to the dtype that it is stored in."""
    precision = torch.finfo(found.dtype)
    wanted = meant.detach().cpu().double()
    tolerance = wanted.abs() * (precision.eps / 2 * 1.01 + FOLDING) + precision.tiny * precision.eps
    return bool(((found.detach().cpu().double() - wanted).abs() <= tolerance).all())


def _scaled(bias: Tensor | None, layer: LoRAWeights) -> Tensor | None:
    return None if bias is None else bias.detach().cpu().double() * layer.scaling


def _part_differs(
    what: str, layer: LoRAWeights, found: Tensor | None, meant: Tensor | None
) -> list[str]:
    """A phrase when a vector beside the factors is not the one meant; zeros are as good as none."""
    if found is None and meant is None:
        return []
    if found is None or meant is None:
        there = found if found is not None else meant
        assert there is not None
        if what == "up-bias" and not there.any():
            return []
        return [f"its {what} is {'missing' if found is None else 'not meant to be there'}"]
    wanted = meant.detach().cpu().double()
    difference = (found.detach().cpu().double().reshape(wanted.shape) - wanted).abs()
    precision = torch.finfo(layer.up.dtype)
    tolerance = wanted.abs() * (precision.eps + FOLDING) + precision.tiny * precision.eps
    return [] if bool((difference <= tolerance).all()) else [f"its {what} differs"]
