"""AdamW with states of 8 bits (Dettmers et al. 2021, "8-bit Optimizers via Block-wise
Quantization"), from torchao."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._triton import has_triton
from torchao.optim import AdamW8bit


class TorchaoAdamW8bit(AdamW8bit):
    """torchao's AdamW8bit, with numbers for learning rates as all other optimizers have them.

    torchao compiles its step, for each shape of a tensor. On the CPU that takes a compiler and half
    a minute at the start, and on a GPU Triton; the step runs uncompiled where it is not worth it.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        rate = param_group.get("lr", self.defaults["lr"])
        super().add_param_group(param_group)
        self.param_groups[-1]["lr"] = rate

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        rates = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
        try:
            with _compiled_or_not(self.param_groups[0]["params"][0].device):
                return super().step(closure)
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate


def _compiled_or_not(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which what is compiled runs so only where that is worth it."""
    if device.type == "cuda" and has_triton():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
