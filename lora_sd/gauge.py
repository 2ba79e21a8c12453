"""Whether an adapter learns: how large its update is beside the weights that it adapts.

The measure is ||dW|| / ||W|| in the Frobenius norm, over all the layers of a block or of a kind as
if they were one long vector. The update itself is not formed: with G = up^T up and H = down down^T,
both of rank x rank, ||up down||^2 = <G, H> (the trace of a product may be turned round).
"""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lora_sd.adapter import LoRAWeights
from lora_sd.algebra.low_rank import kind_of
from lora_sd.gauge_bounds import EXPLODING, LARGE, NIL, NIL_SHARE
from lora_sd.layers import LoRALayer
from lora_sd.parts import block_of

log = logging.getLogger("lora_sd")
FAST = 3.0
"""From `LARGE` on, growth by more than this power of the steps is told, too: at steps of one size
an update grows by the first power, while the rate warms up by the second; with a rate of 1, by
3.4."""
KINDS = {"linear": "update_linear", "conv": "update_conv", "text encoder": "update_text_encoder"}


class Gauge:
    """Measures the update of attached layers, and says when it is nil or explodes.

    Base weights in few bits are measured as what they stand for. A DoRA layer counts with its
    magnitude; PiSSA's start, which is the base's own, does not count.

    Args:
        layers: by full name.
        steps: of the whole run.
        warmup_steps: of the learning rate.
    """

    def __init__(self, layers: Mapping[str, LoRALayer], steps: int, warmup_steps: int) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.rank}
        self._kinds = {name: kind_of(name, one.weight.shape) for name, one in self._layers.items()}
        self._told_nil_from = max(warmup_steps, math.ceil(NIL_SHARE * steps))
        self._base: dict[str, float] = {}
        self._told: set[str] = set()
        self._before: tuple[int, float] = (0, 0.0)

    def measure(self, step: int) -> dict[str, Any]:
        """The numbers for the metrics; a sentence in the log where they call for one.

        Returns:
            'update_linear', 'update_conv' and 'update_text_encoder', as far as there are such
            layers, and 'update_blocks', by block.
        """
        base, update = self._squares()
        shares = {}
        for kind, name in KINDS.items():
            some = [one for one in update if self._kinds[one] == kind]
            if some:
                shares[name] = _ratio(some, update, base)
        blocks: dict[str, list[str]] = {}
        for name in update:
            blocks.setdefault(block_of(name), []).append(name)
        by_block = {block: _ratio(some, update, base) for block, some in blocks.items()}
        self._tell(step, shares, by_block)
        self._before = step, max(shares.values(), default=0.0)
        return {**_finite(shares), "update_blocks": _finite(by_block)}

    def _tell(self, step: int, shares: Mapping[str, float], by_block: Mapping[str, float]) -> None:
        """Say once each what calls for it."""
        largest = max(shares.values(), default=0.0)
        if largest < NIL and step >= self._told_nil_from and "nil" not in self._told:
            self._told.add("nil")
            log.warning(
                "Note: the adapter has hardly changed anything by step %d: its update is %.1g of "
                "the weights it adapts, and should be past %g by now. Raise "
                "optimizer.learning_rate.",
                step, largest, NIL,
            )  # fmt: skip
        if not largest <= EXPLODING and "exploding" not in self._told:
            self._told.add("exploding")
            block = max(by_block, key=lambda one: by_block[one])
            log.warning(
                "Note: the adapter overwhelms the base at step %d: its update is %.2g times the "
                "weights it adapts, most in '%s' (%.2g). Lower optimizer.learning_rate.",
                step, largest, block, by_block[block],
            )  # fmt: skip
        elif self._grows_fast(step, largest) and not self._told & {"growing", "exploding"}:
            self._told.add("growing")
            log.warning(
                "Note: the adapter grows ever faster: its update was %.2g of the weights it adapts "
                "at step %d and is %.2g at step %d. Lower optimizer.learning_rate if the samples "
                "get worse.",
                self._before[1], self._before[0], largest, step,
            )  # fmt: skip

    def _grows_fast(self, step: int, largest: float) -> bool:
        then, was = self._before
        if not (largest > LARGE and 0 < then < step and was > 0):
            return False
        return math.log(largest / was) > FAST * math.log(step / then)

    @torch.no_grad()
    def _squares(self) -> tuple[dict[str, float], dict[str, float]]:
        """(||W||^2, ||dW||^2) of each layer, by name."""
        if not self._base:  # frozen, and so measured once
            self._base = _numbers({name: _base_square(one) for name, one in self._layers.items()})
        update = {name: update_square(layer) for name, layer in self._layers.items()}
        return self._base, _numbers(update)


@torch.no_grad()
def update_square(layer: LoRALayer) -> Tensor:
    """||dW||^2 of what a layer adds to its base's weight at scale 1; an up-bias does not count."""
    weights = layer.weights()
    if weights.magnitude is not None:  # its update has no low rank
        return weights.delta(layer.weight).square().sum()
    return low_rank_square(weights)


def low_rank_square(weights: LoRAWeights) -> Tensor:
    """||scaling * up @ down||^2, a magnitude left out, in float32; of a grouped convolution, the
    sum over its groups."""
    width = weights.up.shape[1]
    groups = weights.rank // width
    up = weights.up.float().reshape(groups, -1, width)
    down = weights.down.float().reshape(groups, width, -1)
    return weights.scaling**2 * ((up.mT @ up) * (down @ down.mT)).sum()


def _base_square(layer: LoRALayer) -> Tensor:
    return torch.linalg.vector_norm(layer.weight.detach(), dtype=torch.float32).square()


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """Without what JSON cannot hold."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers of tensors, fetched from the device at once."""
    if not tensors:
        return {}
    return dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))


def _ratio(names: Iterable[str], update: Mapping[str, float], base: Mapping[str, float]) -> float:
    """||dW|| / ||W|| of layers together; infinite where it is no number."""
    names = list(names)
    of_update, of_base = sum(update[name] for name in names), sum(base[name] for name in names)
    if not math.isfinite(of_update) or (of_base == 0 and of_update > 0):
        return math.inf
    return math.sqrt(max(of_update, 0.0) / of_base) if of_base else 0.0
