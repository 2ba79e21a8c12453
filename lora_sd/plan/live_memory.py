"""How many bytes of tensors are alive while something runs, at most."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While it is entered, counts the storages that operations make, until they are let go.

    It sees what PyTorch's operations return, of real tensors and of `FakeTensorMode`'s alike, in
    the backward pass too; what a kernel takes for itself meanwhile it does not see.

    Args:
        known: tensors that are there already, and are not counted; they have to stay.

    Attributes:
        live: bytes that are alive now.
        peak: the most there were.
        set_apart: bytes, of those alive, that somebody counts elsewhere, such as gradients.
        set_apart_at_peak: how much that was when the most were alive.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.set_apart = self.set_apart_at_peak = 0
        self._known = [tensor.untyped_storage() for tensor in known]  # so that no address is reused
        self._seen: dict[int, Any] = {storage._cdata: storage for storage in self._known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # questions about a tensor, more than half of all calls
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()

        def gone(_: object) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size
        if self.live > self.peak:
            self.peak, self.set_apart_at_peak = self.live, self.set_apart
