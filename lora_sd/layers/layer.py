"""What every adapted layer has in common, whatever it adapts."""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Size, Tensor, nn
from torch.nn import functional as F

from lora_sd.adapter import LoRAWeights, delta_weight, in_file_precision, norms
from lora_sd.layers.fused import adapted
from lora_sd.layers.starts import INITS

Adaptable = nn.Linear | nn.Conv2d | nn.Embedding
PISSA = "pissa"
DORA = ("off", "input", "output")
GIVEN = "given"
"""No start: the factors come from a file, which may hold more ranks than are useful."""


@dataclass(frozen=True)
class LayerOptions:
    """How adapted layers are made, all of a model alike; `LoRALayer` explains each."""

    init: str = "kaiming"
    rs: bool = False
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    up_bias: bool = False
    dora: str = "off"


class LoRALayer(nn.Module):
    """What every adapted layer has in common; use `LinearLoRA`, `ConvLoRA` or `EmbeddingLoRA`.

    Args:
        base: the layer to adapt. It is adopted, not copied, and frozen.
        rank: inner size; 0 leaves the layer as it is.
        alpha: the update is scaled by alpha / rank; None means alpha = rank.
        init: `lora_down`'s start: 'kaiming', 'gaussian' or 'orthogonal'; 'given' for none; or
            'pissa', which starts both factors at the base's principal components and subtracts
            them from it (Meng et al. 2024, "PiSSA", section 3), so that the sum is the base still.
        rs: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, "rsLoRA").
        dropout: share of the update's input that is zeroed in training.
        rank_dropout: share of the ranks that is zeroed in training, for each sample.
        module_dropout: share of the passes in training that leave the whole update out.
        up_bias: give `lora_up` a bias, which starts at zero and is scaled as the rest.
        dora: 'input' or 'output': train the norm of each input's, or of each output's, weights
            apart (Liu et al. 2024, "DoRA", equation 5). The files that A1111, ComfyUI, Forge and
            InvokeAI read hold an input's norms, and PEFT's an output's.
        merged: put the update into the base's weight at once.
        generator: source of `lora_down`'s start; a CPU generator.

    Raises:
        ValueError: the rank is outside 0..limit, or the options do not go together.
    """

    base: Adaptable
    adapter_name = "default"  # tells several adapters of a model apart
    lora_down: Any  # nn.Linear or nn.Conv2d, absent at rank 0
    lora_up: Any
    rank_axis = -1  # of the activation between lora_down and lora_up
    down_start: Tensor | None  # PiSSA: what is subtracted
    up_start: Tensor | None
    magnitude: nn.Parameter | None

    def __init__(
        self,
        base: Adaptable,
        rank: int,
        alpha: float | None = None,
        *,
        init: str = "kaiming",
        rs: bool = False,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        up_bias: bool = False,
        dora: str = "off",
        merged: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if rank and init != GIVEN:
            check_rank(innermost(base), rank)
        if dora not in DORA:
            raise ValueError(f"dora is '{dora}', not one of {', '.join(DORA)}")
        if dora != "off" and up_bias:
            raise ValueError("DoRA has no bias of its own")
        if (dora != "off" or up_bias) and isinstance(innermost(base), nn.Embedding):
            raise ValueError("DoRA and the up-bias have no form for a token table")
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = in_file_precision(rank if alpha is None else alpha)
        self.rs = rs
        self.scale: float | Tensor = 1.0
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.register_buffer("down_start", None, persistent=False)
        self.register_buffer("up_start", None, persistent=False)
        self.register_parameter("magnitude", None)
        self._kept: tuple[Tensor, Tensor | None] | None = None
        self._is_special = up_bias or init == PISSA  # the update is more than the two factors'
        if not rank:
            return
        weight = innermost(base).weight
        self.lora_down, self.lora_up = self._factors(rank, up_bias)
        self.to(weight.device)
        nn.init.zeros_(self.lora_up.weight)
        if up_bias:
            nn.init.zeros_(self.lora_up.bias)
        if weight.is_meta or init == GIVEN:
            pass  # only shapes are wanted
        elif init == PISSA:
            self._start_at_principal_components()
        else:
            start = INITS[init], self._init_view(), generator or torch.default_generator
            start[0](start[1], rank, start[2])
        if dora != "off":
            weight = weight.detach().float()
            self.magnitude = nn.Parameter(norms(weight, magnitude_shape(weight.shape, dora)))
        if merged:
            self.merge()

    def _factors(self, rank: int, up_bias: bool) -> tuple[nn.Module, nn.Module]:
        """(lora_down, lora_up) for the base's shape."""
        raise NotImplementedError

    def _down(self, x: Tensor, weight: Tensor) -> Tensor:
        """The activation of `rank` channels, by a weight of lora_down's shape."""
        raise NotImplementedError

    def _up(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The output of the base's shape, by a weight of lora_up's shape."""
        raise NotImplementedError

    def _init_view(self) -> Tensor:
        """lora_down's weight with the fan-in where the initialisations look for it."""
        weight: Tensor = self.lora_down.weight
        return weight

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank): the one place where it is computed."""
        rank = max(self.rank, 1)
        return self.alpha / (math.sqrt(rank) if self.rs else rank)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; diffusers and transformers read it, for its dtype."""
        return cast(Tensor, self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base, "bias", None)

    @property
    def is_merged(self) -> bool:
        """Whether the update, or that of an adapter inside, is in the base's weight."""
        inside = isinstance(self.base, LoRALayer) and self.base.is_merged
        return self._kept is not None or inside

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Keep the factors in this precision. DoRA's magnitude stays: rounded, it would be another
        norm than the base's, and a fresh adapter would change something."""
        if not self.rank:
            return
        self.lora_down.to(dtype)
        self.lora_up.to(dtype)
        if self.down_start is not None and self.up_start is not None:
            self.down_start, self.up_start = self.down_start.to(dtype), self.up_start.to(dtype)

    def set_scale(self, scale: float | Tensor) -> None:
        """Set the scale: a number, or a tensor (samples,) of one for each sample of a batch.

        A batch may be a multiple of the samples, as guidance makes it: they are then repeated.

        Raises:
            ValueError: a tensor, for a merged layer.
        """
        if self._kept is not None and isinstance(scale, Tensor):
            raise ValueError("a merged adapter has one scale for all samples: unmerge it first")
        self.scale = scale if isinstance(scale, Tensor) else float(scale)
        if self._kept is not None:
            self.unmerge()
            self.merge()

    def forward(self, x: Tensor) -> Tensor:
        """The base's output plus the scaled update, in the base output's dtype."""
        if self.base is None:
            scale = 0.0 if self._is_off() else self._scale_for(x)
            return self._low_rank(x, scale * self.scaling)
        if self._kept is not None or not self.rank or self._is_off():
            return self.base(x)
        if self.magnitude is not None:
            return self._decomposed(x, self.magnitude)
        fused = self._fused(x)
        if fused is not None:
            return fused
        out = self.base(x)
        return out + self._low_rank(x, self._scale_for(x) * self.scaling).to(out.dtype)

    def update(self, x: Tensor) -> Tensor:
        """scaling * up(down(x)): what is added to the base's output at scale 1."""
        return self._low_rank(x, self.scaling)

    def _fused(self, x: Tensor) -> Tensor | None:
        """The same by the fast path, or None where that does not hold."""
        drops = self.training and (self.dropout or self.rank_dropout)
        if drops or self._is_special or isinstance(self.scale, Tensor):
            return None
        down, up = self.lora_down.weight, self.lora_up.weight
        return adapted(self.base, x, down, up, self.scale * self.scaling)

    def _low_rank(self, x: Tensor, factor: float | Tensor) -> Tensor:
        """factor * up(down(x)), with the dropouts of training."""
        x = x.to(self.lora_down.weight.dtype) if x.is_floating_point() else x  # ids stay ids
        hidden = self._down(self._dropped(x), self.lora_down.weight)
        if self.training and self.rank_dropout:
            hidden = hidden * self._rank_mask(hidden)
        out = self._up(hidden * factor, self.lora_up.weight)
        if self.down_start is not None and self.up_start is not None:
            out = out - self._up(self._down(x, self.down_start) * factor, self.up_start)
        if self.lora_up.bias is not None:
            out = out + self._by_channel(self.lora_up.bias) * factor
        return out

    def _decomposed(self, x: Tensor, magnitude: Tensor) -> Tensor:
        """The base's output, and scale times what DoRA's differs from it.

        The norm is a constant in the backward pass, as section 4.3 of the paper has it.
        """
        plain = innermost(self.base)
        if isinstance(self.base, LoRALayer) and self.base.is_merged:
            raise ValueError("DoRA over a merged adapter has lost its base: unmerge that first")
        weight = self.weight.detach().float()
        ratio = magnitude / norms(weight + self._weight_update(), magnitude.shape)
        if magnitude.shape == magnitude_shape(weight.shape, "output"):
            out = self.base(x)
            unbiased = out if plain is self.base else plain(x)
            if plain.bias is not None:
                unbiased = unbiased - self._by_channel(plain.bias)
            ratio = self._by_channel(ratio.flatten())
            added = (ratio - 1) * unbiased + ratio * self.update(x)
        else:
            scaled = (x * self._by_input(ratio)).to(x.dtype)
            whole, update = plain(scaled), self.update(scaled)
            if plain is self.base and isinstance(self.scale, float) and self.scale == 1:
                return cast(Tensor, whole + update.to(whole.dtype))
            out = self.base(x)
            added = whole - (out if plain is self.base else plain(x)) + update
        return cast(Tensor, out + (self._scale_for(out) * added).to(out.dtype))

    @torch.no_grad()
    def _weight_update(self) -> Tensor:
        """What the factors add to the base's weight, in float32; exact zeros at the start."""
        alpha = self.scaling * self.rank
        update = delta_weight(self.lora_down.weight, self.lora_up.weight, alpha)
        if self.down_start is not None and self.up_start is not None:
            update = update - delta_weight(self.down_start, self.up_start, alpha)
        return update

    def _by_channel(self, values: Tensor) -> Tensor:
        """Values of the output channels (out,), shaped to go with an output."""
        return values

    def _by_input(self, values: Tensor) -> Tensor:
        """Values of the weight's inputs (1, in[, 1, 1]), shaped to go with an input."""
        return values

    def _is_off(self) -> bool:
        if isinstance(self.scale, float) and self.scale == 0:
            return True
        return (
            self.training
            and self.module_dropout > 0
            and float(torch.rand(())) < self.module_dropout
        )

    def _scale_for(self, x: Tensor) -> float | Tensor:
        """The scale; one for each sample is repeated to the batch and shaped to go with it."""
        if not isinstance(self.scale, Tensor):
            return self.scale
        times, rest = divmod(x.shape[0], len(self.scale))
        if rest:
            raise ValueError(f"{len(self.scale)} scales for a batch of {x.shape[0]}")
        scale = self.scale.to(x.device, self.lora_up.weight.dtype).repeat(times)
        return scale.view(-1, *[1] * (self._down_dims(x) - 1))

    def _down_dims(self, x: Tensor) -> int:
        """How many axes the activation of `rank` channels has."""
        return x.dim()

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """0 for the ranks that a sample goes without, and what keeps the mean for the others."""
        shape = [hidden.shape[0], *[1] * (hidden.dim() - 1)]
        shape[self.rank_axis] = self.rank
        kept = torch.rand(shape, device=hidden.device) >= self.rank_dropout
        return kept.to(hidden.dtype) / (1 - self.rank_dropout)

    @torch.no_grad()
    def _start_at_principal_components(self) -> None:
        if self.scaling <= 0:
            raise ValueError("PiSSA needs an alpha above 0")
        if getattr(innermost(self.base), "groups", 1) != 1:
            raise ValueError("PiSSA has no form for grouped convolutions")
        down, up = self.lora_down.weight, self.lora_up.weight
        matrix = innermost(self.base).weight.float().flatten(1)
        if isinstance(innermost(self.base), nn.Embedding):
            matrix = matrix.T
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = (values[: self.rank] / self.scaling).sqrt()
        down.copy_((root[:, None] * right[: self.rank]).reshape(down.shape))
        up.copy_((left[:, : self.rank] * root).reshape(up.shape))
        self.down_start, self.up_start = down.detach().clone(), up.detach().clone()

    def weights(self, exact: bool = False) -> LoRAWeights:
        """What the layer has learnt, detached and not copied, as an adapter's file means it.

        rsLoRA's scaling is folded into alpha. PiSSA's start is subtracted by as many ranks again:
        up @ down - up_start @ down_start, written as (up - up_start) @ down + up_start @ (down -
        down_start), since the difference of two large products would drown in float16's rounding.

        Args:
            exact: the factors of PiSSA as they are, from which `load` takes them to the bit.
        """
        down, up = self.lora_down.weight.detach(), self.lora_up.weight.detach()
        alpha = in_file_precision(self.scaling * self.rank) if self.rs else self.alpha
        if self.down_start is not None and self.up_start is not None:
            down, down_start = down.float(), self.down_start.float()
            up, up_start = up.float(), self.up_start.float()
            left = up if exact else up - up_start
            right = down_start if exact else down - down_start
            down = torch.cat([down, right])
            up = torch.cat([left, -up_start if exact else up_start], dim=1)
            alpha *= 2
        return LoRAWeights(
            down,
            up,
            alpha,
            None if self.lora_up.bias is None else self.lora_up.bias.detach(),
            None if self.magnitude is None else self.magnitude.detach(),
            isinstance(innermost(self.base), nn.Embedding),
        )

    def difference(self, weights: LoRAWeights) -> str:
        """What of `weights` this layer cannot take over: 'has rank 4, not 8'; '' when it can."""
        mine = self.weights(exact=True)
        for what, have, given in (
            ("rank", mine.rank, weights.rank),
            ("shape", tuple(mine.weight_shape), tuple(weights.weight_shape)),
            ("alpha", mine.alpha, weights.alpha),
            ("up-bias", mine.up_bias is not None, weights.up_bias is not None),
            ("magnitude", mine.magnitude is not None, weights.magnitude is not None),
        ):
            if have != given:
                return f"has {what} {given}, not {have}"
        return ""

    def add_magnitude(self, magnitude: Tensor) -> None:
        """Make this a DoRA layer with a given magnitude, for each output or for each input."""
        self.magnitude = nn.Parameter(magnitude.to(self.lora_up.weight.device, torch.float32))

    @torch.no_grad()
    def load(self, weights: LoRAWeights) -> None:
        """Take over what `weights(exact=True)` returned once, to the bit.

        Raises:
            ValueError: they are another layer's; the sentence says in what.
        """
        if different := self.difference(weights):
            raise ValueError(different)
        mine, merged = self.weights(exact=True), self._kept is not None
        self.unmerge()
        self.lora_down.weight.copy_(weights.down[: self.rank])
        self.lora_up.weight.copy_(weights.up[:, : weights.up.shape[1] * self.rank // mine.rank])
        if self.down_start is not None and self.up_start is not None:
            self.down_start.copy_(weights.down[self.rank :])
            self.up_start.copy_(-weights.up[:, self.rank :])
        if weights.up_bias is not None:
            self.lora_up.bias.copy_(weights.up_bias)
        if weights.magnitude is not None and self.magnitude is not None:
            self.magnitude.copy_(weights.magnitude)
        if merged:
            self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Put the update, at the present scale, into the base's weight; a copy of it is kept."""
        if self._kept is not None or not self.rank:
            return
        if isinstance(self.base, LoRALayer) or isinstance(self.scale, Tensor):
            raise ValueError("nested adapters and scales by sample cannot be merged here")
        if not isinstance(self.weight, nn.Parameter):
            raise ValueError("a weight in few bits has no room for an update")
        bias = cast(Tensor | None, self.bias)
        self._kept = self.weight.detach().clone(), None if bias is None else bias.detach().clone()
        weights = self.weights()
        delta = weights.delta(self.weight)
        self.weight.copy_(self.weight.float() + self.scale * delta)
        add_to_bias(self.base, weights.bias_delta(), self.scale)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's weight back, bit for bit."""
        if self._kept is None:
            return
        weight, bias = self._kept
        self._kept = None
        self.weight.copy_(weight)
        restore_bias(self.base, bias)

    def extra_repr(self) -> str:
        scale = f"{self.scale:g}" if isinstance(self.scale, float) else "by sample"
        return f"rank={self.rank}, alpha={self.alpha:g}, scale={scale}"


def innermost(layer: nn.Module) -> Any:
    """The plain layer under any number of wrappers."""
    while isinstance(layer, LoRALayer):
        layer = layer.base
    return layer


def weight_shape(layer: Any) -> Size:
    """The shape of a plain layer's weight; one in few bits is not unpacked for it."""
    known = getattr(layer, "weight_shape", None)
    return layer.weight.shape if known is None else known


def rank_limit(weight_shape: Size, groups: int = 1) -> int:
    """The highest useful rank: the smaller side of the weight seen as (out, in * kernel), for each
    group of a grouped convolution."""
    return groups * min(weight_shape[0] // groups, weight_shape[1:].numel())


def check_rank(base: Adaptable, rank: int) -> None:
    """Raises ValueError when `rank` is not between 1 and the layer's limit."""
    limit = rank_limit(base.weight.shape, getattr(base, "groups", 1))
    if not 1 <= rank <= limit:
        raise ValueError(f"rank {rank} is outside 1..{limit}")


def add_to_bias(layer: Any, delta: Tensor | None, scale: float) -> None:
    """Add scale * delta to a layer's bias, which it is given where it has none."""
    if delta is None:
        return
    delta = delta.to(layer.weight.device)
    if layer.bias is None:
        layer.bias = nn.Parameter(delta.new_zeros(delta.shape).to(layer.weight.dtype), False)
    layer.bias.copy_(layer.bias.float() + scale * delta)


def restore_bias(layer: Any, kept: Tensor | None) -> None:
    """Put a kept bias back; None: the layer had none."""
    if kept is not None:
        layer.bias.copy_(kept)
    elif getattr(layer, "bias", None) is not None:
        layer.bias = None


def magnitude_shape(weight_shape: Size, dora: str) -> Size:
    """Shape of a DoRA magnitude: one value for each 'input' or each 'output' of a weight."""
    outputs, inputs, *kernel = weight_shape
    ones = [1] * len(kernel)
    return Size((outputs, 1, *ones) if dora == "output" else (1, inputs, *ones))
