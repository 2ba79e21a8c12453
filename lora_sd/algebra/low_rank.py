"""The singular values of a layer's update, and its best approximation of a lower rank.

The update is `scaling * up @ down`, and both factors are thin: with up = Qu Ru and down^T = Qd Rd
its singular values are those of the rank x rank matrix `scaling * Ru Rd^T`. The update itself is
never formed. The best approximation of a rank keeps the largest singular values (Eckart and Young
1936), and its error is the rest of them. All of it in float64.

A layer with a DoRA magnitude is seen without it here: as base + low-rank update, before the norms
are set. A token table's update counts transposed, which leaves its singular values alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Size, Tensor

from lora_sd.adapter import LoRAWeights
from lora_sd.parts import TEXT_ENCODERS, component_of, is_conv

KINDS = ("linear", "conv", "text encoder")


def kind_of(name: str, weight_shape: Size) -> str:
    """One of KINDS: the UNet's linear layers (1 x 1 convolutions among them) and convolutions, and
    all layers of the text encoders."""
    if component_of(name) in TEXT_ENCODERS:
        return "text encoder"
    return "conv" if is_conv(weight_shape) else "linear"


def matrices(layer: LoRAWeights) -> tuple[Tensor, Tensor]:
    """(up, down) as float64 matrices (out, rank) and (rank, in); a grouped convolution's up is
    block-diagonal then."""
    up, down = layer.up.double().flatten(1), layer.down.double().flatten(1)
    groups = layer.rank // up.shape[1]
    return (torch.block_diag(*up.chunk(groups)) if groups > 1 else up), down


def singular_values(layer: LoRAWeights) -> Tensor:
    """Singular values of the update at scale 1 (min(rank, out, in),), falling."""
    up, down = matrices(layer)
    core = torch.linalg.qr(up, mode="r").R @ torch.linalg.qr(down.T, mode="r").R.T
    return layer.scaling * torch.linalg.svdvals(core)


class Svd(NamedTuple):
    """left (out, n), values (n,), right (n, in) in float64, whose product is a layer's update."""

    left: Tensor
    values: Tensor
    right: Tensor


def svd(layer: LoRAWeights) -> Svd:
    """Singular value decomposition of the update at scale 1; n is min(rank, out, in)."""
    up, down = matrices(layer)
    up_base, up_rest = torch.linalg.qr(up)
    down_base, down_rest = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(up_rest @ down_rest.T, full_matrices=False)
    return Svd(up_base @ left, layer.scaling * values, right @ down_base.T)


def rank_for_energy(values: Tensor, share: float) -> int:
    """The lowest rank, at least 1, whose largest singular values hold `share` (0..1) of the
    energy, which is the sum of their squares."""
    energy = values.square().cumsum(0)
    reached = energy >= share * energy[-1]
    return 1 + int(reached.int().argmax())


@dataclass(frozen=True)
class RankLimit:
    """How far to lower ranks.

    Attributes:
        rank: the highest for linear layers and text encoders; None: no limit.
        conv_rank: the highest for convolutions; None: as `rank`.
        energy: share (0..1) of each layer's energy to keep; None: all that the rank allows.
    """

    rank: int | None = None
    conv_rank: int | None = None
    energy: float | None = None

    def of(self, kind: str, values: Tensor) -> int:
        """The rank for a layer of a kind with these singular values."""
        rank = len(values) if self.energy is None else rank_for_energy(values, self.energy)
        return self.capped(kind, rank)

    def capped(self, kind: str, rank: int) -> int:
        """The rank, or the highest for that kind of layer."""
        conv_rank = self.rank if self.conv_rank is None else self.conv_rank
        limit = conv_rank if kind == "conv" else self.rank
        return rank if limit is None else min(rank, limit)

    @property
    def is_none(self) -> bool:
        """Whether it limits nothing."""
        return self == RankLimit()


def truncated(layer: LoRAWeights, rank: int, known: Svd | None = None) -> LoRAWeights:
    """The layer's best approximation of at most `rank`, in float32; one that has no more is
    returned as it is, and so is a grouped convolution, whose factors cannot be mixed.

    alpha stays the number it was; the factors make up for the changed alpha / rank, and so does
    `up_bias`. A magnitude is kept.

    Args:
        known: `svd(layer)`, where it is known already.
    """
    if rank >= layer.rank or layer.up.shape[1] != layer.rank:
        return layer
    left, values, right = known or svd(layer)
    rank = min(rank, len(values))
    scaling = layer.alpha / rank
    # Both factors carry the root of the singular values, so that neither is small in float16.
    root = (values[:rank] / scaling).sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    bias = layer.up_bias
    return replace(
        layer,
        up=up.float().reshape(layer.up.shape[0], rank, *layer.up.shape[2:]),
        down=down.float().reshape(rank, *layer.down.shape[1:]),
        up_bias=None if bias is None else bias.float() * (layer.scaling / scaling),
    )


def from_delta(
    delta: Tensor, alpha: float, rank_of: Callable[[Tensor], int]
) -> tuple[LoRAWeights, Tensor]:
    """(best factors in float32, all singular values) of a dense update shaped as its weight.

    Through the eigenvectors of the smaller Gram matrix in float64: exact to about 1e-8 of the
    largest singular value, and several times faster than an SVD of the whole.

    Args:
        rank_of: chooses the rank by the singular values (min(out, in),).
    """
    matrix = delta.double().flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    energies, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values = energies.flip(0).clamp(min=0).sqrt()
    rank = rank_of(values)
    vectors = vectors.flip(1)[:, :rank]
    # The eigenvectors times the matrix carry the singular values; both factors get their root.
    root = values[:rank].sqrt()
    share = torch.where(root > 0, 1 / root, 0)
    if wide:
        up, down = vectors * root, share[:, None] * (vectors.T @ matrix)
    else:
        up, down = matrix @ vectors * share, root[:, None] * vectors.T
    up = up.float() / (alpha / rank)
    kernel = [1] * (delta.dim() - 2)
    layer = LoRAWeights(
        down=down.float().reshape(rank, *delta.shape[1:]),
        up=up.reshape(len(up), rank, *kernel),
        alpha=alpha,
    )
    return layer, values


@dataclass
class TruncationError:
    """What lowering ranks loses, gathered layer by layer: energies by kind of layer."""

    lost: dict[str, float]
    whole: dict[str, float]

    @classmethod
    def none(cls) -> "TruncationError":
        return cls(dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0))

    def add(self, kind: str, values: Tensor, rank: int) -> None:
        """Count a layer with these singular values that keeps `rank` of them."""
        energies = values.square()
        self.whole[kind] += float(energies.sum())
        self.lost[kind] += float(energies[rank:].sum())

    def of(self, kinds: Sequence[str] = KINDS) -> float:
        """Relative Frobenius error of all updates of these kinds taken together, 0..1."""
        whole = sum(self.whole[kind] for kind in kinds)
        return (sum(self.lost[kind] for kind in kinds) / whole) ** 0.5 if whole else 0.0

    def sentence(self) -> str:
        """'error 3.1 % (linear 2.9 %, conv 4.0 %)': relative Frobenius norm of what is lost."""
        kinds = [f"{kind} {100 * self.of([kind]):.2g} %" for kind in KINDS if self.whole[kind]]
        return f"error {100 * self.of():.2g} % ({', '.join(kinds)})"
