"""Experts whose 4-bit weights stay in the host's memory or in a file, and are brought to a GPU for each product.

The next weight is copied while the current one is multiplied, on a stream of its own, so that two weights are on the
GPU at a time. On the CPU nothing is copied: a weight in a file is a mapping, whose pages the kernel reads when they are
needed and drops when memory is short.
"""

import ctypes
import os
import sys
import tempfile
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.nn.experts4bit import Experts4bit
from qlora.ops.common import refuse_double_backward, refuse_forward_mode

PLACES = ("ram", "disk")

_Place = tuple[bool, tuple[int, ...]]  # a call: in the backward, addresses of the last weights and this one
_CONTEXT = 3  # a checkpointed layer's weights occur twice each in its backward


def mapped_copy(tensor: Tensor, folder: str | Path) -> Tensor:
    """A copy of a uint8 tensor in a file in ``folder`` that is mapped into memory.

    The file has no name any more when this returns, so it vanishes with the process. Raises OSError if the disk is
    full.
    """
    if tensor.numel() == 0:
        return tensor.detach().cpu()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="experts-", suffix=".bin") as file:
        # Without space for it, a write to the mapping would end the process instead of raising an error.
        os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=torch.uint8).view(tensor.shape)
    return mapped.copy_(tensor.detach())


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a file's, by the kernel's own list; False where there is no such list."""
    if tensor.device.type != "cpu" or not sys.platform.startswith("linux"):
        return False
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= tensor.data_ptr() < end:
            return inode != "0" and not (path and path[0].startswith(("/dev/shm", "/memfd")))
    return False


def release_heap() -> None:
    """Gives the pages of freed memory back to the system.

    glibc before 2.38 does not reuse freed aligned blocks of the same size. Quantizing a model expert by expert would
    otherwise leave as much unused memory as the model takes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class _Copy(NamedTuple):
    """A copy on a device, and of what it is one. It is old if the weight has changed since."""

    weight: Tensor  # kept alive, so that no other tensor gets its address
    version: int
    device: torch.device
    made: Future  # (copy, event)

    def is_of(self, weight: Tensor, device: torch.device) -> bool:
        same = self.weight.data_ptr() == weight.data_ptr() and self.version == _version(weight)
        return same and self.device == device


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


class Stage:
    """Brings weights of the host to a device, and the one that follows ahead of time.

    What follows a weight is learnt from the calls, separately for the forward and the backward (which may run a part of
    the forward again). So the first step copies each weight when it is needed. ``copies`` counts the copies, ``ahead``
    those of them that had begun before they were needed. The last two copies stay on the device.
    """

    def __init__(self) -> None:
        self.copies = self.ahead = 0
        self._follower: dict[_Place, weakref.ref[Tensor]] = {}
        self._place: _Place | None = None  # of the last call
        self._begun: _Copy | None = None
        self._held: _Copy | None = None  # the last copy: a backward often begins with it
        self._thread = ThreadPoolExecutor(1, "qlora-offload")  # a copy from unpinned memory keeps a thread busy
        self._streams: dict[torch.device, Any] = {}

    def is_needed(self, weight: Tensor, x: Tensor) -> bool:
        """Whether a product with ``x`` needs a copy of ``weight``."""
        return weight.device != x.device

    def fetch(self, weight: Tensor, device: torch.device) -> Tensor:
        """``weight`` on the device, for work of its current stream."""
        if self._place is not None:
            self._follower[self._place] = weakref.ref(weight)
        in_backward = torch._C._current_graph_task_id() != -1
        last = self._place[1] if self._place is not None else ()
        self._place = (in_backward, (*last, weight.data_ptr())[-_CONTEXT:])
        if self._held is None or not self._held.is_of(weight, device):
            self._held = None  # frees it before the next copy
            self._held = self._take(weight, device)
        copy, _ = self._held.made.result()
        follower = self._follower.get(self._place, lambda: None)()
        is_new = self._begun is None or follower is None or not self._begun.is_of(follower, device)
        if follower is not None and is_new and follower.data_ptr() != weight.data_ptr():
            self._begun = self._begin(follower, device)
        return copy

    def _take(self, weight: Tensor, device: torch.device) -> _Copy:
        """A copy of ``weight`` that has begun already, or a new one, ready for the device's current stream."""
        begun, self._begun = self._begun, None
        if begun is not None and not begun.is_of(weight, device):  # the guess was wrong, or the weight has changed
            begun.made.cancel()
            begun = None
        self.ahead += begun is not None
        try:
            taken = begun or self._begin(weight, device)
            copy, event = taken.made.result()
        except torch.OutOfMemoryError:
            if begun is None:
                raise
            taken = self._begin(weight, device)  # it began while another product needed its memory
            copy, event = taken.made.result()
        if event is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(event)
            copy.record_stream(current)
        return taken

    def _begin(self, weight: Tensor, device: torch.device) -> _Copy:
        return _Copy(weight, _version(weight), device, self._thread.submit(self._copy, weight, device))

    def _copy(self, weight: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        self.copies += 1
        if device.type != "cuda":
            return weight.detach().to(device, copy=True), None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        with torch.cuda.stream(self._streams[device]):
            copy = weight.detach().to(device, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return copy, event

    def project(self, x: Tensor, packed: Tensor, *rest: Any) -> Tensor:
        """:func:`qlora.ops.forward_experts` with ``packed`` on the host; ``rest`` are its further arguments."""
        refuse_forward_mode(x, *rest)
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
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            refuse_double_backward(ctx)
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

    ``where`` is "ram" for the host's memory (pinned for a GPU; torch rounds the size of each up to a power of two), or
    "disk" for a file in ``folder`` that is mapped into memory; weights that are files already stay where they are. Call
    it before ``model.to("cuda")``. On the CPU, "disk" lets a model be larger than the memory. Returns the
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
            if where == "disk" and not is_mapped(packed):
                assert folder is not None
                layer.register_parameter(name, nn.Parameter(mapped_copy(packed, folder), requires_grad=False))
            elif where == "ram":
                host = packed.detach().cpu()
                host = host.clone() if is_mapped(host) else host
                host = host.pin_memory() if torch.cuda.is_available() else host
                layer.register_parameter(name, nn.Parameter(host, requires_grad=False))
        layer.stage = stage
    return moved
