"""An optimizer whose saved state is taken over to the bit."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lora_sd.errors import RunError


class Resumable(Optimizer):
    """Comes before an optimizer's class among the bases of a class made of both.

    torch gives every state of floating point its parameter's precision as it is loaded, which
    rounds what was kept in float32 beside a bfloat16 parameter; and it takes over the saved run's
    hyperparameters, so that a setting that was changed on purpose would silently not count.

    Attributes:
        settings: keys of the groups that the present settings decide.
        source: the package of the state, where another's would mean nothing to it.
    """

    settings: frozenset[str]
    source: str

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "source": self.source}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take a state over.

        Raises:
            RunError: it is another package's.
        """
        was = state_dict.get("source", self.source)
        if was != self.source:
            raise RunError(
                f"The optimizer's state was saved by {was} and cannot be read by {self.source}. "
                f"{'Install' if was == 'bitsandbytes' else 'Remove'} bitsandbytes to go on."
            )
        present = [
            {key: value for key, value in group.items() if key in self.settings}
            for group in self.param_groups
        ]
        super().load_state_dict(
            {key: value for key, value in state_dict.items() if key != "source"}
        )
        for group, settings in zip(self.param_groups, present, strict=True):
            group.update(settings)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, number in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(number, {}).items():
                    self._as_saved(parameter, key, value)

    def _as_saved(self, parameter: Tensor, key: str, value: Any) -> None:
        state = self.state[parameter]
        if isinstance(value, Tensor) and state[key].dtype != value.dtype:
            state[key] = value.to(parameter.device)


def resumable(optimizer: type[Optimizer]) -> type[Resumable]:
    """A class of an optimizer that is resumable."""
    return type(optimizer.__name__, (Resumable, optimizer), {})


def averages_itself(optimizer: Optimizer) -> bool:
    """Whether an optimizer holds an average of the weights and is switched to it by `eval`."""
    return "train_mode" in optimizer.param_groups[0]


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """The present learning rate of each group, by its name; with what Prodigy found of it."""
    return {
        str(group.get("name", number)): float(group["lr"]) * float(group.get("d", 1.0))
        for number, group in enumerate(optimizer.param_groups)
    }
