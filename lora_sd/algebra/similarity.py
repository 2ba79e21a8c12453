"""How alike two adapters are: the angle between what they add to the base's weights.

The inner product of two layers' updates is that of their factors,

    <up_a down_a, up_b down_b> = sum((up_a^T up_b) * (down_a down_b^T)),

so that no update is formed. Magnitudes of DoRA are left out, as in `low_rank`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lora_sd.adapter import Adapter, LoRAWeights
from lora_sd.algebra.low_rank import KINDS, kind_of, matrices
from lora_sd.algebra.spectrum import BLOCK_ORDER
from lora_sd.errors import AdapterError
from lora_sd.parts import block_of


@dataclass(frozen=True)
class Pair:
    """Some layers of two adapters taken together; what only one has counts as 0 in the other.

    Attributes:
        inner: inner product of the updates at scale 1.
        energies: squared Frobenius norms of the first's and the second's.
        shared: how many layers both have.
    """

    block: str
    kind: str
    inner: float
    energies: tuple[float, float]
    shared: int

    @property
    def norms(self) -> tuple[float, float]:
        first, second = self.energies
        return first**0.5, second**0.5

    @property
    def cosine(self) -> float | None:
        """1: the same direction, 0: nothing in common, -1: opposite; None where one is 0."""
        first, second = self.norms
        return max(-1.0, min(1.0, self.inner / (first * second))) if first and second else None


@dataclass(frozen=True)
class Similarity:
    """Of two adapters.

    Attributes:
        blocks: one for each block and kind of layer.
        only: names of the layers that only the first has, and only the second.
    """

    blocks: list[Pair]
    only: tuple[list[str], list[str]]

    @property
    def whole(self) -> Pair:
        """All layers together."""
        first, second = (sum(pair.energies[i] for pair in self.blocks) for i in (0, 1))
        inner = sum(pair.inner for pair in self.blocks)
        return Pair("all", "all", inner, (first, second), sum(pair.shared for pair in self.blocks))


def similarity(
    first: Adapter, second: Adapter, watch: Callable[[Iterable[str]], Iterable[str]] = iter
) -> Similarity:
    """Compare two adapters of the same model.

    Args:
        watch: wraps the walk over the layers, to show progress.

    Raises:
        AdapterError: a layer's weight has another shape in each.
    """
    sums: dict[tuple[str, str], list[float]] = {}
    names = [*first.layers, *(name for name in second.layers if name not in first.layers)]
    for name in watch(names):
        a, b = first.layers.get(name), second.layers.get(name)
        there = a or b
        assert there is not None
        if a and b and a.weight_shape != b.weight_shape:
            shapes = f"{tuple(a.weight_shape)} and {tuple(b.weight_shape)}"
            raise AdapterError(
                f"The adapters were made for different models: '{name}' is {shapes} in them."
            )
        place = (block_of(name), kind_of(name, there.weight_shape))
        own = sums.setdefault(place, [0.0, 0.0, 0.0, 0.0])
        own[0] += _inner(a, b) if a and b else 0.0
        own[1] += _inner(a, a) if a else 0.0
        own[2] += _inner(b, b) if b else 0.0
        own[3] += bool(a and b)
    blocks = [
        Pair(block, kind, inner, (max(energy_a, 0.0), max(energy_b, 0.0)), int(shared))
        for block in BLOCK_ORDER
        for kind in KINDS
        if (block, kind) in sums
        for inner, energy_a, energy_b, shared in [sums[block, kind]]
    ]
    only_first = [name for name in first.layers if name not in second.layers]
    return Similarity(blocks, (only_first, [n for n in names if n not in first.layers]))


def _inner(a: LoRAWeights, b: LoRAWeights) -> float:
    (up_a, down_a), (up_b, down_b) = matrices(a), matrices(b)
    return float(a.scaling * b.scaling * ((up_a.T @ up_b) * (down_a @ down_b.T)).sum())
