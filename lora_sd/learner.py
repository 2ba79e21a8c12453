"""What learns, and how fast: parameters, optimizer, learning rates, averages."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from lora_sd.ema import averaged, make_ema
from lora_sd.layers import LoRALayer
from lora_sd.optimizers import (
    learning_rates,
    make_optimizer,
    make_schedule,
    parameter_groups,
    scale_weight_norms,
)


class Stateful(Protocol):
    """Whatever has a state that a run needs to go on: optimizer, schedule, scaler, ..."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as `torch.load(weights_only=True)` reads them."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state over."""


class Learner:
    """The adapter's parameters and all that changes them.

    Args:
        layers: the attached layers, by full name.
        steps: optimizer steps of the whole run.
        optimizer, options: its name and further arguments.
        groups: what each part learns at, as `optimizers.parameter_groups` takes it.
        schedule: how the learning rate moves, as `optimizers.make_schedule` takes it.
        ema_decay: of a moving average of the adapter; 0: none.

    Raises:
        ConfigError: the optimizer is not installed or has no such argument, or a pattern fits no
            layer.
    """

    def __init__(
        self,
        layers: Mapping[str, LoRALayer],
        accelerator: Accelerator,
        steps: int,
        *,
        optimizer: str,
        options: list[str],
        groups: Mapping[str, Any],
        schedule: Mapping[str, Any],
        max_grad_norm: float,
        max_weight_norm: float | None,
        ema_decay: float,
    ) -> None:
        self._layers, self._accelerator = layers, accelerator
        self._max_grad_norm, self._max_weight_norm = max_grad_norm, max_weight_norm
        found = parameter_groups(layers, **groups)
        self.parameters: list[nn.Parameter] = [one for group in found for one in group["params"]]
        self.optimizer = make_optimizer(optimizer, found, options, accelerator.device)
        self.schedule = make_schedule(self.optimizer, steps, **schedule)
        self._ema = make_ema(self.parameters, ema_decay)
        # Wraps it for the scaler, and skips steps whose gradient overflowed.
        self._stepped: Any = accelerator.prepare_optimizer(self.optimizer)

    @property
    def stateful(self) -> dict[str, Stateful]:
        """What has a state, by its name in a checkpoint; in the order it is to be loaded."""
        found: dict[str, Stateful] = {"optimizer": self.optimizer, "schedule": self.schedule}
        if self._accelerator.scaler is not None:
            found["scaler"] = self._accelerator.scaler
        if self._ema is not None:
            found["ema"] = self._ema
        return found

    def rates(self) -> dict[str, float]:
        """The present learning rate of each group, by its name."""
        return learning_rates(self.optimizer)

    def clip(self) -> float:
        """Scale the gradients down to the largest norm allowed; the norm they had."""
        return float(self._accelerator.clip_grad_norm_(self.parameters, self._max_grad_norm))

    def step(self) -> None:
        """Change the adapter by its gradients, and drop them."""
        self._stepped.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self._max_weight_norm is not None:
            scale_weight_norms(self._layers.values(), self._max_weight_norm)
        if self._ema is not None:
            self._ema.step(self.parameters)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the weights are those to be used: the average, where there is one."""
        return averaged(self.optimizer, self._ema)
