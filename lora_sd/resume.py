"""Put a run back where its newest whole checkpoint stands."""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lora_sd import checkpoint, inject
from lora_sd.errors import RunError
from lora_sd.formats import load_adapter
from lora_sd.layers import LoRALayer
from lora_sd.run_folder import RunFolder

log = logging.getLogger("lora_sd")


class Stateful(Protocol):
    """Whatever has a state that a run needs to go on: optimizer, schedule, scaler, ..."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, as `torch.load(weights_only=True)` reads them."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take a state over."""


def restore(
    run: RunFolder,
    identity: checkpoint.Identity,
    layers: Mapping[str, LoRALayer],
    stateful: Mapping[str, Stateful],
    device: torch.device,
    is_main: bool,
) -> int:
    """Put the newest whole checkpoint of a run into place; the step it stands at.

    Args:
        stateful: what has a state, by its name in the checkpoint.

    Raises:
        RunError: no checkpoint can be used, or the run is no longer the same.
    """
    if is_main and (leftovers := checkpoint.clean(run)):
        log.info("Removed %d unfinished saves of a killed process.", leftovers)
    folder, rejected = checkpoint.find_newest(run, identity)
    for reason in rejected:
        log.warning("Note: %s", reason)
    step = 0
    if folder is None:
        if run.adapter_file.exists():
            raise RunError(
                f"'{run.path}' has its result but no checkpoints to go on from. It is left as it "
                f"is; start a new run."
            )
        log.info("Nothing was saved before the run stopped: it begins again.")
    else:
        shapes = {name: layer.weight.shape for name, layer in layers.items()}
        inject.load(layers, load_adapter(folder / checkpoint.ADAPTER, shapes))
        state = checkpoint.load_state(folder, device)
        for name, one in stateful.items():
            one.load_state_dict(state[name])
        step = checkpoint.step_of(folder)
        log.info("Going on from step %d.", step)
    if is_main:
        run.cut_metrics(step)
    return step
