"""Experts whose 4-bit weights stay in the host's memory or in a file, and are brought to a GPU for each product.

The next weight is copied while the current one is multiplied, on a stream of its own, so that two weights are on the
GPU at a time. On the CPU nothing is copied: a weight in a file is a mapping, whose pages the kernel reads when they are
needed and drops when memory is short.
"""

import ctypes
import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.nn.experts4bit import Experts4bit

logger = logging.getLogger(__name__)

PLACES = ("ram", "disk")

_Place = tuple[bool, tuple[int, ...]]  # a call: in the backward, addresses of the last weights and this one
_CONTEXT = 3  # a checkpointed layer's weights occur twice each in its backward


def mapped_copy(tensor: Tensor, folder: str | Path) -> Tensor:
    """A copy of a uint8 tensor in a file in ``folder`` that is mapped into memory.

    The file has no name any more when this returns, so it vanishes with the process. Raises OSError if the disk is
    full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"experts-{os.getpid()}-{id(tensor)}.bin"
    if tensor.numel() == 0:
        return tensor.detach().cpu()
    try:
        with path.open("xb") as file:
            # Without space for it, a write to the mapping would end the process instead of raising an error.
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=torch.uint8).view(tensor.shape)
    finally:
        path.unlink(missing_ok=True)
    return mapped.copy_(tensor.detach())


def release_heap() -> None:
    """Gives the pages of freed memory back to the system.

    glibc before 2.38 does not reuse freed aligned blocks of the same size. Quantizing a model expert by expert would
    otherwise leave as much unused memory as the model takes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Stage:
    """Brings weights of the host to a device, and the one that follows ahead of time.

    What follows a weight is learnt from the calls, separately for the forward and the backward (which may run a part of
    the forward again). So the first step copies each weight when it is needed. ``copies`` counts the copies, ``ahead``
    those of them that had begun before they were needed.
    """

    def __init__(self) -> None:
        self.copies = self.ahead = 0
        self._follower: dict[_Place, Tensor] = {}
        self._place: _Place | None = None  # of the last call
        self._begun: dict[int, Future] = {}
        self._held: tuple[int, torch.device, Tensor] | None = None  # the last copy: a backward often begins with it
        self._thread = ThreadPoolExecutor(1, "qlora-offload")  # a copy from unpinned memory keeps a thread busy
        self._streams: dict[torch.device, Any] = {}

    def is_needed(self, weight: Tensor, x: Tensor) -> bool:
        """Whether a product with ``x`` needs a copy of ``weight``."""
        return weight.device != x.device

    def fetch(self, weight: Tensor, device: torch.device) -> Tensor:
        """``weight`` on the device, for work of its current stream."""
        key = weight.data_ptr()
        if self._place is not None:
            self._follower[self._place] = weight
        in_backward = torch._C._current_graph_task_id() != -1
        self._place = (in_backward, (*(self._place[1] if self._place is not None else ()), key)[-_CONTEXT:])
        if self._held is not None and self._held[:2] == (key, device):
            copy = self._held[2]
        else:
            self._held = None
            copy = self._take(weight, device)
            self._held = (key, device, copy)
        follower = self._follower.get(self._place)
        if follower is not None and follower.data_ptr() != key and follower.data_ptr() not in self._begun:
            self._begun[follower.data_ptr()] = self._thread.submit(self._copy, follower, device)
        return copy

    def _take(self, weight: Tensor, device: torch.device) -> Tensor:
        """A copy of ``weight`` that has begun already, or a new one."""
        begun = self._begun.pop(weight.data_ptr(), None)
        self.ahead += begun is not None
        for other in self._begun.values():  # the guess was wrong
            other.cancel()
        self._begun.clear()
        copy, event = (begun or self._thread.submit(self._copy, weight, device)).result()
        if event is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            copy.record_stream(current)
        return copy

    def _copy(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self.copies += 1
        if device.type != "cuda":
            return weight.to(device, copy=True), None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(self._streams[device]):
            copy = weight.to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return copy, event

    def project(self, x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        """:func:`qlora.ops.forward_experts` with ``packed`` on the host; ``rest`` are its further arguments."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _Project.apply(self, packed, x, *rest)

    def __deepcopy__(self, memo: Any) -> "Stage":
        return Stage()

    def __reduce__(self) -> Any:
        return Stage, ()


class _Project(torch.autograd.Function):
    """``forward.experts`` that keeps no weight on the device for its backward, which fetches it again."""

    @staticmethod
    def forward(ctx: Any, stage: Stage, packed: Tensor, x: Tensor, *rest: Any) -> Tensor:
        absmax, nested_absmax, nested_offset, *form, expert_of_row, a, b, scaling, bias = rest
        ctx.stage, ctx.packed, ctx.form, ctx.scaling = stage, packed, form, scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, absmax, nested_absmax, nested_offset, expert_of_row, a, b)
        return torch.ops.qlora.forward.experts(x, stage.fetch(packed, x.device), *rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *statistics, expert_of_row, a, b = ctx.saved_tensors
        _, _, needs_x, *_, needs_a, needs_b, _, needs_bias = ctx.needs_input_grad
        packed = ctx.stage.fetch(ctx.packed, x.device)
        needs = needs_x, needs_a or needs_b, needs_bias
        d_x, d_a, d_b, d_bias = torch.ops.qlora.backward.experts(
            grad, x, packed, *statistics, *ctx.form, expert_of_row, a, b, ctx.scaling, *needs
        )
        return (
            None,
            None,
            d_x if needs_x else None,
            *(None,) * 7,
            d_a if needs_a else None,
            d_b if needs_b else None,
            None,
            d_bias.to(ctx.bias_dtype) if needs_bias else None,
        )


def offload_experts(model: nn.Module, where: str, folder: str | Path | None = None) -> int:
    """Keeps the 4-bit weights of a model's experts on the host, also when the model moves to a GPU.

    ``where`` is "ram" for the host's memory (pinned for a GPU), or "disk" for a file in ``folder`` that is mapped into
    memory. Call it before ``model.to("cuda")``. On the CPU, "disk" lets a model be larger than the memory. Returns the
    bytes of these weights.

    Raises ValueError for another place, a missing folder, or a model without 4-bit experts.
    """
    if where not in PLACES:
        raise ValueError(f"where='{where}' must be one of {', '.join(PLACES)}")
    if where == "disk" and folder is None:
        raise ValueError("where='disk' needs a folder for the weights")
    layers = [module for module in model.modules() if isinstance(module, Experts4bit)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no experts in 4 bit to offload")
    stage = Stage()  # the weights of all layers follow each other
    moved = 0
    for layer in layers:
        for name in layer.weight_names:
            packed = getattr(layer, name)
            moved += packed.nbytes
            if where == "disk" and name not in layer.mapped_names:
                assert folder is not None
                layer.register_parameter(name, nn.Parameter(mapped_copy(packed, folder), requires_grad=False))
                layer.mapped_names |= {name}
            elif where == "ram":
                host = packed.detach().cpu()
                _pin(host)
                layer.register_parameter(name, nn.Parameter(host, requires_grad=False))
        layer.stage = stage
    return moved


def _pin(host: Tensor) -> None:
    """Registers a tensor's own memory with CUDA. torch's pin_memory() would round its size up to a power of two."""
    if not torch.cuda.is_available() or host.numel() == 0:
        return
    status = torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    if int(status) != 0:
        logger.warning("cannot pin %d MiB of experts (CUDA error %s): copies will be slower", host.nbytes >> 20, status)
