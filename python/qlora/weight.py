"""QuantizedWeight: the four tensors of a 4-bit weight, with its shape and format."""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora import _C, ops
from qlora.tables import table

_BNB_STATE = "quant_state.bitsandbytes__"


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of ``shape``, quantized blockwise to 4 bit. Immutable; can be moved, pickled and sharded.

    The format is bit-compatible with bitsandbytes (docs/concepts/format.md). ``dtype`` is the weight's dtype before
    quantization and the default dtype of :meth:`dequantize`.
    """

    packed: Tensor  # uint8 [ceil(numel / 2)], high nibble first
    absmax: Tensor  # float32 [blocks], or uint8 codes with double quantization
    nested_absmax: Tensor  # float32 [ceil(blocks / 256)], empty without double quantization
    nested_offset: Tensor  # float32 [1], empty without double quantization
    shape: tuple[int, ...]
    quant_type: str = "nf4"
    block_size: int = 64  # weights per absmax
    dtype: torch.dtype = torch.float32

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in the operators' order of arguments."""
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...], str, int]:
        """What the operators take of a weight, in their order: ``ops.forward(x, *w.arguments)``."""
        return *self.tensors, self.shape, self.quant_type, self.block_size

    @property
    def double_quant(self) -> bool:
        return self.nested_absmax.numel() > 0

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight and all of its statistics."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def bits_per_param(self) -> float:
        return 8 * self.nbytes / max(1, self.numel)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A dense tensor of ``shape``; ``dtype`` is float32, bfloat16 or float16."""
        return ops.dequantize(*self.arguments, dtype or self.dtype)

    def error_against(self, weight: Tensor) -> tuple[float, float]:
        """(relative Frobenius norm, largest absolute value) of the difference to ``weight``.

        Raises ValueError if ``weight`` has another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}: the quantized one has {self.shape}")
        squared, squares, largest = ops.quantization_error(
            weight.detach(), *self.tensors, self.quant_type, self.block_size
        ).tolist()
        return math.sqrt(squared / squares) if squares > 0 else 0.0, largest

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """This weight on another device. The dtypes of the tensors are part of the format and never change."""
        packed, absmax, nested_absmax, nested_offset = (t.to(device) for t in self.tensors)
        return replace(self, packed=packed, absmax=absmax, nested_absmax=nested_absmax, nested_offset=nested_offset)

    def shard(self, index: int, count: int) -> "QuantizedWeight":
        """Rows ``[index * n / count, (index + 1) * n / count)`` of a matrix, as views.

        Raises ValueError if a shard would not start at a block (with double quantization: at a block of 256 scales).
        """
        n, k = self.shape
        unit = self.block_size * (_C.NESTED_BLOCK if self.double_quant else 1)
        if not 0 <= index < count or n % count or (n // count * k) % unit:
            raise ValueError(
                f"shard {index} of {count} of shape {self.shape}: n must divide evenly, and a shard of n/count rows"
                f" must be a multiple of {unit} elements"
            )
        numel = n // count * k
        blocks = numel // self.block_size
        nested = blocks // _C.NESTED_BLOCK
        return replace(
            self,
            packed=self.packed.flatten()[index * numel // 2 : (index + 1) * numel // 2],
            absmax=self.absmax[index * blocks : (index + 1) * blocks],
            nested_absmax=self.nested_absmax[index * nested : (index + 1) * nested]
            if self.double_quant
            else self.nested_absmax,
            shape=(n // count, k),
        )

    def to_bnb(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The state-dict entries of a bitsandbytes Linear4bit: ``weight``, ``weight.absmax``, ….

        Raises ValueError for int4, which bitsandbytes does not have.
        """
        if self.quant_type not in _C.BITSANDBYTES_QUANT_TYPES:
            known = " and ".join(_C.BITSANDBYTES_QUANT_TYPES)
            raise ValueError(f"quant_type='{self.quant_type}' does not exist in bitsandbytes: only {known} do")
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.shape,
        }
        entries = {
            prefix: self.packed.view(-1, 1),
            f"{prefix}.absmax": self.absmax,
            f"{prefix}.quant_map": table(_C.codebook(self.quant_type), self.packed) + 0.0,  # its table has no -0
        }
        if self.double_quant:
            entries[f"{prefix}.nested_absmax"] = self.nested_absmax
            entries[f"{prefix}.nested_quant_map"] = table(_C.dynamic_map(), self.packed)
            state["nested_blocksize"] = _C.NESTED_BLOCK
            state["nested_dtype"] = "float32"
            state["nested_offset"] = self.nested_offset.item()
        entries[f"{prefix}.{_BNB_STATE}{self.quant_type}"] = torch.frombuffer(
            bytearray(json.dumps(state).encode()), dtype=torch.uint8
        ).to(self.device)
        return entries

    @classmethod
    def from_bnb(cls, entries: dict[str, Tensor], prefix: str = "weight") -> "QuantizedWeight":
        """Reads the state-dict entries of a bitsandbytes Linear4bit; extra keys are ignored.

        Raises KeyError naming a missing entry, and ValueError for a state that this format cannot represent.
        """
        markers = [key for key in entries if key.startswith(f"{prefix}.{_BNB_STATE}")]
        if len(markers) != 1:
            raise KeyError(f"expected one entry '{prefix}.{_BNB_STATE}…' among {sorted(entries)}")
        state = json.loads(bytes(entries[markers[0]].tolist()))
        nested = f"{prefix}.nested_absmax" in entries
        if nested and state["nested_blocksize"] != _C.NESTED_BLOCK:
            raise ValueError(f"nested_blocksize={state['nested_blocksize']} must be {_C.NESTED_BLOCK}")
        dtype = getattr(torch, str(state["dtype"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype={state['dtype']!r} is not a torch dtype")
        ops.check_format(state["quant_type"], state["blocksize"])
        entries = dict(entries)
        maps = {"quant_map": _C.codebook(state["quant_type"])} | (
            {"nested_quant_map": _C.dynamic_map()} if nested else {}
        )
        for name, values in maps.items():
            theirs = entries.get(f"{prefix}.{name}")
            if theirs is not None and not torch.equal(theirs.float(), table(values, theirs)):
                raise ValueError(f"{prefix}.{name} is another table than {state['quant_type']}'s: it cannot be read")
        shape = tuple(int(extent) for extent in state["shape"])
        packed = entries[prefix].contiguous().view(torch.uint8).flatten()  # quant_storage may be any dtype
        needed = (torch.Size(shape).numel() + 1) // 2
        if packed.numel() != needed:
            raise ValueError(f"{prefix} has {packed.numel()} bytes: shape {shape} needs {needed}")
        blocks = -(-torch.Size(shape).numel() // state["blocksize"])
        statistics = {"absmax": (torch.uint8 if nested else torch.float32, blocks)}
        if nested:
            statistics["nested_absmax"] = (torch.float32, -(-blocks // _C.NESTED_BLOCK))
        for name, (kind, count) in statistics.items():
            tensor = entries[f"{prefix}.{name}"]
            if kind.is_floating_point and tensor.is_floating_point():  # other tools store them in 16 bit
                tensor = entries[f"{prefix}.{name}"] = tensor.float()
            if tensor.dtype != kind or tuple(tensor.shape) != (count,):
                raise ValueError(
                    f"{prefix}.{name} is {tensor.dtype} {tuple(tensor.shape)}: shape {shape} needs {kind} ({count},)"
                )
        absmax = entries[f"{prefix}.absmax"]
        none = absmax.new_empty(0, dtype=torch.float32)
        return cls(
            packed=packed,
            absmax=absmax,
            nested_absmax=entries[f"{prefix}.nested_absmax"] if nested else none,
            nested_offset=table([state["nested_offset"]], absmax) if nested else none,
            shape=shape,
            quant_type=state["quant_type"],
            block_size=state["blocksize"],
            dtype=dtype,
        )


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    check_finite: bool = True,
) -> QuantizedWeight:
    """Quantizes ``weight`` (float32, bfloat16 or float16, any shape) to 4 bit.

    Same arguments and errors as :func:`qlora.ops.quantize`. The result can be used in training, even if this function
    is called under torch.inference_mode.
    """
    with torch.inference_mode(False):
        packed, absmax, nested_absmax, nested_offset = ops.quantize(
            weight.detach(), quant_type, block_size, double_quant, check_finite
        )
    return QuantizedWeight(
        packed, absmax, nested_absmax, nested_offset, tuple(weight.shape), quant_type, block_size, weight.dtype
    )


def quantize_to_searched_scales(
    weight: Tensor,
    importance: Tensor,
    like: QuantizedWeight,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantizedWeight:
    """Quantizes ``weight``, float32 (n, k), in the format of ``like``, whose scales and codes are not used.

    Arguments and errors as in :func:`qlora.ops.search_scales` and :func:`qlora.ops.quantize_with_feedback`.
    """
    scales = ops.search_scales(weight, importance, like.quant_type, like.block_size, like.double_quant)
    packed = ops.quantize_with_feedback(weight, *scales, like.quant_type, like.block_size, feedback, order)
    return replace(like, packed=packed, absmax=scales[0], nested_absmax=scales[1], nested_offset=scales[2])
