"""A base model of shapes without numbers, on the meta device: what comes out of it has the right
shape and dtype, and takes no memory."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from lora_sd import inject
from lora_sd.base_files.components import empty_part
from lora_sd.base_model import BaseModel
from lora_sd.layer_choice import LayerPlan
from lora_sd.layers import PISSA, LayerOptions, LoRALayer
from lora_sd.memory.idle_parts import IdleParts

NARROWED = (F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.bmm, Tensor.matmul)
"""What mixed precision computes in its dtype, of what the parts of Stable Diffusion do."""
WIDENED_BY_CUDA = (F.layer_norm, F.group_norm, F.softmax)
"""What it computes, and keeps for the backward pass, in float32; the CPU's does not (PyTorch's
documentation of torch.amp, "CUDA ops that can autocast to float32")."""
NARROW = (torch.bfloat16, torch.float16)


class Arithmetic(TorchFunctionMode):
    """How a device computes: mixed precision, which there is none of on the meta device, and
    attention that keeps no matrix of all places by all places for the backward pass.

    Args:
        autocast: the dtype of mixed precision, or None.
        like_cuda: by the rules of a GPU of NVIDIA's rather than the CPU's.
    """

    def __init__(self, autocast: torch.dtype | None, like_cuda: bool) -> None:
        super().__init__()
        self.autocast, self.like_cuda = autocast, like_cuda
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}

    def again(self) -> "Arithmetic":
        """The same, for a computation of its own, which casts weights anew."""
        return Arithmetic(self.autocast, self.like_cuda)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            args = tuple(map(self._narrowed, args))
            kwargs = {name: self._narrowed(value) for name, value in kwargs.items()}
            return _attention(*args, **kwargs)
        if self.autocast is not None:
            change = None
            if func in NARROWED:
                change = self._narrowed
            elif func in WIDENED_BY_CUDA and self.like_cuda:
                change = _widened
            if change is not None:
                args = tuple(map(change, args))
                kwargs = {name: change(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _narrowed(self, value: Any) -> Any:
        is_wide = isinstance(value, Tensor) and value.dtype == torch.float32
        if self.autocast is None or not is_wide:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.autocast)
        # What learns is cast once, until the computation ends.
        if id(value) not in self._cast:
            self._cast[id(value)] = value, value.to(self.autocast)
        return self._cast[id(value)][1]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of which the output and a number for each query are kept, as the flash and the
    memory-efficient kernels of CPU and CUDA do alike."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = flash(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


@dataclass(repr=False)
class ShapedBase(BaseModel):
    """A base model whose tensors have shape and dtype alone."""

    def __post_init__(self) -> None:
        self.device = torch.device("meta")
        self.idle = IdleParts({}, {}, {}, self.device)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """All that has weights, by name."""
        return {**self.components, "vae": self.vae}

    def tensors(self) -> Iterator[Tensor]:
        """Every weight and buffer."""
        for module in self.parts.values():
            yield from module.parameters()
            yield from module.buffers()

    def recompute_with(self, arithmetic: Arithmetic) -> None:
        """Turn gradient checkpointing on; what is recomputed is computed alike."""
        options: dict[str, Any] = {
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), arithmetic.again()),
        }
        again: Callable[..., Any] = partial(checkpoint, **options)
        self.unet.enable_gradient_checkpointing(lambda module, *args: again(module, *args))
        for encoder in self.text_encoders:
            encoder.activation_checkpointing_enable(options)  # type: ignore[operator]


def shaped_base(
    name: str, configs: Mapping[str, Mapping[str, Any]], clip_skip: int = 1
) -> ShapedBase:
    """A base model from the configs of its parts, in float32.

    Args:
        configs: by component; that of SDXL has 'text_encoder_2'.

    Raises:
        ValueError, TypeError, LookupError: a config is of another kind of model.
    """
    with torch.device("meta"):
        modules: dict[str, Any] = {
            part: empty_part(part, configs[part]).requires_grad_(False).eval()
            for part in ("unet", "text_encoder", "text_encoder_2", "vae")
            if configs.get(part)
        }
    tokenizer: Any = None  # nothing is read, and nothing drawn
    scheduler: Any = None
    return ShapedBase(
        name=name, tokenizer=tokenizer, scheduler=scheduler, clip_skip=clip_skip, **modules
    )


def attach(
    base: ShapedBase,
    plans: Sequence[LayerPlan],
    options: LayerOptions,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
    adapter_dtype: torch.dtype,
) -> dict[str, LoRALayer]:
    """Attach adapters, and give all weights the dtypes that they have in training.

    Args:
        dtype: of the base's weights but for the VAE's.
    """
    layers = inject.attach(base.components, plans, options)
    for part, module in base.parts.items():
        frozen = vae_dtype if part == "vae" else dtype
        for parameter in module.parameters():
            parameter.data = parameter.data.to(
                frozen if not parameter.requires_grad else parameter.dtype
            )
    for layer in layers.values():
        layer.set_dtype(adapter_dtype)
    if options.init == PISSA:  # a layer of shapes has no start of its own to keep
        for layer in layers.values():
            layer.down_start = torch.empty_like(layer.lora_down.weight, requires_grad=False)
            layer.up_start = torch.empty_like(layer.lora_up.weight, requires_grad=False)
    return layers
