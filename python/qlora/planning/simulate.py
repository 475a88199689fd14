"""Traces a training step without computing it, and finds the peak of the bytes that live at once.

The model runs forward and backward on torch's fake tensors, which have shapes but no data. So the result follows from
the real code of the model, of checkpointing and of qlora's layers, not from a formula.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators create, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def count(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._let_go, key)

    def _let_go(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result


def peak_of_a_step(model: nn.Module, batch: int, sequence: int, loss: Callable[..., Any]) -> int:
    """Peak bytes of a forward and backward of ``model``, including its parameters and buffers.

    The model is on the meta device; ``batch`` sequences of ``sequence`` tokens. ``loss(model, ids)`` returns the loss.
    """
    live = LiveBytes()
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        model.to_empty(device="cpu")
        tie = getattr(model, "tie_weights", None)
        if callable(tie):
            tie()
        for tensor in [*model.parameters(), *model.buffers()]:
            live.count(tensor)
        live.peak = live.now
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        loss(model, ids).backward()
    return live.peak
