"""What the numbers of an adapter say: norms, spectrum and effective rank by layer, block and kind.

The update of a layer is what it adds to its base weight at scale 1. Its energy is the square of its
Frobenius norm, which is the sum of the squares of its singular values; energies of layers add up.
The singular values are those of `low_rank`, which a DoRA layer's magnitude does not enter.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_sd.adapter import Adapter
from lora_sd.algebra.low_rank import KINDS, kind_of, rank_for_energy, singular_values
from lora_sd.parts import BLOCKS, REST, TEXT_ENCODERS, block_of

BLOCK_ORDER = (*BLOCKS, REST, *TEXT_ENCODERS)
MOST_ENERGY = 0.95
ReadWeight = Callable[[str], Tensor]  # a layer's full name -> its base weight


@dataclass(frozen=True)
class LayerFacts:
    """One layer in numbers.

    Attributes:
        kind: one of `low_rank.KINDS`.
        values: singular values of the update, falling.
        base_norm: Frobenius norm of the base weight, where the base was given.
        dora: whether the layer has a magnitude.
    """

    name: str
    shape: tuple[int, ...]
    block: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    values: tuple[float, ...]
    base_norm: float | None = None
    dora: bool = False

    @property
    def energy(self) -> float:
        return sum(value * value for value in self.values)

    @property
    def norm(self) -> float:
        """Frobenius norm of the update."""
        return math.sqrt(self.energy)

    @property
    def relative_norm(self) -> float | None:
        """The update's norm over the base weight's; None without a base."""
        return self.norm / self.base_norm if self.base_norm else None

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the energy shares p = s^2 / sum(s^2): 1 for one direction, the rank
        for equal ones. After Roy and Vetterli 2007, "The effective rank", with energies in place of
        their singular values. 0 for an update that is zero."""
        if not self.energy:
            return 0.0
        shares = [value * value / self.energy for value in self.values]
        return math.exp(-sum(share * math.log(share) for share in shares if share > 0))

    @property
    def stable_rank(self) -> float:
        """Energy over that of the largest singular value; 0 for an update that is zero."""
        return self.energy / self.values[0] ** 2 if self.energy else 0.0

    @property
    def rank_for_most(self) -> int:
        """The rank that keeps MOST_ENERGY of the energy."""
        return rank_for_energy(torch.tensor(self.values, dtype=torch.float64), MOST_ENERGY)


@dataclass(frozen=True)
class Group:
    """Layers of one kind taken together: those of a block, or of all blocks ('all')."""

    block: str
    kind: str
    layers: Sequence[LayerFacts]

    @property
    def name(self) -> str:
        """'up.1 conv', 'text_encoder'."""
        return self.block if self.block in TEXT_ENCODERS else f"{self.block} {self.kind}"

    @property
    def energy(self) -> float:
        return sum(layer.energy for layer in self.layers)

    @property
    def norm(self) -> float:
        """Frobenius norm of all updates together."""
        return math.sqrt(self.energy)

    @property
    def relative_norm(self) -> float | None:
        """Norm of all updates over that of all their base weights; None without a base."""
        norms = [layer.base_norm for layer in self.layers]
        known = [norm for norm in norms if norm is not None]
        if len(known) < len(norms) or not any(known):
            return None
        return self.norm / math.sqrt(sum(norm * norm for norm in known))

    @property
    def ranks(self) -> str:
        """'16', or '4-16' where they differ."""
        return span([layer.rank for layer in self.layers])

    @property
    def alphas(self) -> str:
        """'8', or '1-8' where they differ."""
        return span([layer.alpha for layer in self.layers])

    def mean(self, number: Callable[[LayerFacts], float]) -> float:
        """Mean of a number over the layers."""
        return sum(map(number, self.layers)) / len(self.layers)

    def spectrum(self) -> list[float]:
        """Root of the energy that each layer's n-th direction holds, summed over the layers.

        Cutting every layer to rank r keeps the energy of the first r of them.
        """
        longest = max(len(layer.values) for layer in self.layers)
        energies = [0.0] * longest
        for layer in self.layers:
            for index, value in enumerate(layer.values):
                energies[index] += value * value
        return [math.sqrt(energy) for energy in energies]


def span(numbers: Iterable[float]) -> str:
    """'16', or '4-16' where the numbers differ."""
    ordered = sorted(set(numbers))
    ends = ordered if len(ordered) == 1 else [ordered[0], ordered[-1]]
    return "-".join(f"{number:g}" for number in ends)


def layer_facts(adapter: Adapter, read_base: ReadWeight | None = None) -> Iterator[LayerFacts]:
    """The numbers of each layer, one after the other.

    Args:
        read_base: gives a layer's base weight, for norms relative to it.
    """
    for name, layer in adapter.layers.items():
        yield LayerFacts(
            name=name,
            shape=tuple(layer.weight_shape),
            block=block_of(name),
            kind=kind_of(name, layer.weight_shape),
            rank=layer.rank,
            alpha=layer.alpha,
            scaling=layer.scaling,
            values=tuple(singular_values(layer).tolist()),
            base_norm=float(read_base(name).float().norm()) if read_base else None,
            dora=layer.magnitude is not None,
        )


def by_block(facts: Iterable[LayerFacts]) -> list[Group]:
    """The layers of each block and kind together: 'down.1 linear', 'down.1 conv', ..."""
    facts = list(facts)
    return [
        Group(block, kind, found)
        for block in BLOCK_ORDER
        for kind in KINDS
        if (found := [layer for layer in facts if (layer.block, layer.kind) == (block, kind)])
    ]


def by_kind(facts: Iterable[LayerFacts]) -> list[Group]:
    """All linear layers, all convolutions, all of the text encoders."""
    facts = list(facts)
    return [
        Group("all", kind, found)
        for kind in KINDS
        if (found := [layer for layer in facts if layer.kind == kind])
    ]
