"""Tables and scales of the format as tensors: what Python reads of a 4-bit weight beside its operators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora import _C

_DYNAMIC_MAP = tuple(_C.dynamic_map())  # read here, since torch.compile cannot call into the module


def table(values: Sequence[float], like: Tensor) -> Tensor:
    """A table of the format as a float32 tensor on the device of ``like``, regardless of torch's default dtype."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)


def scales(absmax: Tensor, nested_absmax: Tensor | None, nested_offset: Tensor | None) -> Tensor:
    """The float32 scale of every block: absmax itself, or absmax dequantized from its 8-bit codes (two roundings)."""
    if nested_absmax is None or nested_absmax.numel() == 0:
        return absmax.float()
    assert nested_offset is not None
    return nested_scales(absmax, nested_absmax, nested_offset, torch.arange(absmax.numel(), device=absmax.device))


def nested_scales(codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, block: Tensor) -> Tensor:
    """The float32 scales of some blocks, from their uint8 codes and their block indices (of the same shape)."""
    values = table(_DYNAMIC_MAP, codes)[codes.long()]
    return values * nested_absmax[block // _C.NESTED_BLOCK] + nested_offset
