"""Parts of a model that are not wanted for a while: where they are until they are used again."""

from collections.abc import Mapping

import torch
from torch import nn

from lora_sd.base_files.components import TITLES, Part
from lora_sd.base_files.digests import weights_digest
from lora_sd.errors import BaseModelError

WAYS = ("release", "cpu", "keep")


class IdleParts:
    """Lets a model's parts go, and brings them back.

    Args:
        parts: by name: 'vae', 'text_encoder', ...
        sources: where each was loaded from.
        weights: hash of each part's weights.
        device: where they are used.

    Attributes:
        way: 'release': they leave memory, and are read again from their files; 'cpu': they wait in
            the CPU's memory, where they stay if that is what computes; 'keep': they stay.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        sources: Mapping[str, Part],
        weights: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self.way = "release"
        self._parts, self._sources, self._weights = dict(parts), sources, weights
        self._device = device
        self._released: set[str] = set()
        self._waiting: set[str] = set()

    def release(self, *names: str) -> None:
        """Let parts go until they are used again.

        Raises:
            ValueError: an adapter is in one that is to leave memory, which no file holds.
        """
        for name in names:
            module = self._parts[name]
            if self.way == "cpu" and name not in self._released:
                module.to("cpu")
                self._waiting.add(name)
            elif self.way == "release":
                if not self._sources[name].holds(module):
                    raise ValueError(f"'{name}' has adapters in it: detach them first")
                for child in module.modules():
                    for key, weight in child._parameters.items():
                        if weight is not None:
                            empty = nn.Parameter(weight.to("meta"), requires_grad=False)
                            child._parameters[key] = empty
                self._released.add(name)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self, *names: str) -> None:
        """Bring parts back, or all that were let go.

        Raises:
            BaseModelError: the files are not there any more, or hold something else now.
        """
        wanted = set(names) or self._parts.keys()
        for name in self._waiting.intersection(wanted):
            self._parts[name].to(self._device)
            self._waiting.remove(name)
        for name in self._released.intersection(wanted):
            self._read_again(name)
            self._released.remove(name)

    def _read_again(self, name: str) -> None:
        source, module = self._sources[name], self._parts[name]
        try:
            is_touched = source.is_touched()
            source.fill(module, self._device)
            # Touched, it may be the same still: copied back, or moved to another disk.
            is_other = is_touched and weights_digest(module) != self._weights[name]
        except OSError as error:
            raise BaseModelError(
                f"The {TITLES[name]} of '{source.files.name}' was let go while it was not used and "
                f"cannot be read again: {error.strerror}. Put the file back, or set "
                f"memory.idle_parts to cpu or keep."
            ) from error
        if is_other:
            raise BaseModelError(
                f"The {TITLES[name]} of '{source.files.name}' has changed on disk since it was "
                f"loaded: put the old file back, or start again with the new one."
            )
