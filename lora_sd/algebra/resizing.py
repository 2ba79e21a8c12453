"""An adapter's best approximation of a lower rank, layer by layer; see `low_rank`."""

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from lora_sd.adapter import Adapter
from lora_sd.algebra.low_rank import RankLimit, TruncationError, kind_of, singular_values, truncated

Watch = Callable[[Iterable[str]], Iterable[str]]
Spectra = Mapping[str, Tensor]
BISECTIONS = 40


def spectra(adapter: Adapter, watch: Watch = iter) -> dict[str, Tensor]:
    """Singular values of every layer, by its name.

    Args:
        watch: wraps the walk over the layers, to show progress.
    """
    return {name: singular_values(adapter.layers[name]) for name in watch(adapter.layers)}


def ranks_within(adapter: Adapter, limit: RankLimit, values: Spectra) -> dict[str, int]:
    """The rank that the limit leaves each layer, never above its own."""
    return {
        name: limit.of(kind_of(name, layer.weight_shape), values[name])
        for name, layer in adapter.layers.items()
    }


def resize(
    adapter: Adapter, limit: RankLimit, values: Spectra | None = None, watch: Watch = iter
) -> tuple[Adapter, TruncationError]:
    """The adapter with every layer's rank lowered to the limit, and what is lost.

    Each layer keeps alpha, bias and DoRA magnitude; a layer within the limit is returned bit for
    bit. The error is of the updates without the magnitudes, and before any rounding to a file's
    precision.

    Args:
        values: `spectra(adapter)`, where they are known already.
        watch: wraps the walk over the layers, to show progress.
    """
    values = spectra(adapter) if values is None else values
    ranks = ranks_within(adapter, limit, values)
    error, layers = TruncationError.none(), {}
    for name in watch(adapter.layers):
        layer = truncated(adapter.layers[name], ranks[name])
        error.add(kind_of(name, layer.weight_shape), values[name], layer.rank)
        layers[name] = layer
    return Adapter(layers, dict(adapter.metadata)), error


def tensor_bytes(adapter: Adapter, ranks: Mapping[str, int], itemsize: int) -> int:
    """What an adapter file's tensors take at these ranks and bytes a number; headers not counted.

    A number of rank 1 costs a layer one row of down and one column of up.
    """
    total = 0
    for name, layer in adapter.layers.items():
        factors = (layer.down.numel() + layer.up.numel()) // layer.rank * ranks[name]
        extras = [extra.numel() for extra in (layer.up_bias, layer.magnitude) if extra is not None]
        total += itemsize * (factors + sum(extras)) + 4  # alpha is float32
    return total


def limit_for_size(
    adapter: Adapter, values: Spectra, most_bytes: int, itemsize: int, limit: RankLimit
) -> RankLimit | None:
    """`limit` with the highest share of energy for which `tensor_bytes` fits; None: not even rank 1
    throughout does."""

    def fits(energy: float) -> bool:
        tried = RankLimit(limit.rank, limit.conv_rank, energy)
        ranks = ranks_within(adapter, tried, values)
        return tensor_bytes(adapter, ranks, itemsize) <= most_bytes

    if fits(1.0):
        return RankLimit(limit.rank, limit.conv_rank, 1.0)
    if not fits(0.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return RankLimit(limit.rank, limit.conv_rank, low)
