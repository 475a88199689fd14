"""bitsandbytes' operators and layers on the kernels of this package."""

import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qlora import _C, ops
from qlora._load import has_cuda_ops
from qlora.tables import table


def _bytes(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.uint8).flatten()


def _scales(
    absmax: Tensor, nested: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three statistics with the dtypes that the operators need: other tools store float statistics in 16 bit."""
    if nested is None or offset is None:
        return absmax.float(), None, None
    return absmax, nested.float(), offset.float().reshape(1)


def _check_map(code: Tensor) -> None:
    """Raises ValueError if ``code`` is not bitsandbytes' own dynamic map, the only one that the kernels support."""
    if not torch.equal(code.float(), table(_C.dynamic_map(), code)):
        raise ValueError("absmax_code is not the 8-bit dynamic map: these scales cannot be dequantized")


def _quantize_4bit(dense: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, absmax, _, _ = ops.quantize(dense, quant_type, blocksize, double_quant=False, check_finite=False)
    return packed.view(quant_storage).unsqueeze(1), absmax


def _dequantize_4bit(
    packed: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return ops.dequantize(_bytes(packed), *_scales(absmax), shape, quant_type, blocksize, dtype)


def _dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    out.copy_(_dequantize_4bit(packed, absmax, blocksize, quant_type, shape, dtype))


def _gemm_4bit(
    x: Tensor,
    packed: Tensor,
    shape: list[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    scales = _scales(absmax)
    if absmax_8bit is not None:
        assert absmax_code is not None
        assert absmax_offset is not None
        if absmax_code.device.type == "cpu":  # reading it on a GPU would wait for the device
            _check_map(absmax_code)
        scales = _scales(absmax_8bit, absmax, absmax_offset)
    return ops.forward(x, _bytes(packed), *scales, shape, quant_type, blocksize, bias=bias)


def _gemv_4bit(x: Tensor, packed: Tensor, shape: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    if absmax.dtype != torch.float32:
        raise ValueError(
            "bitsandbytes repacked these weights for CPU inference, which rounds their scales: call"
            " qlora.integrations.bitsandbytes.accelerate() before the first forward in eval mode"
        )
    quant_type = "fp4" if code[1] > 0 else "nf4"
    return _gemm_4bit(x, packed, shape, absmax, blocksize, quant_type)


def _gemv_4bit_out(
    x: Tensor, packed: Tensor, shape: list[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    out.copy_(_gemv_4bit(x, packed, shape, absmax, code, blocksize))


_KERNELS = {
    "quantize_4bit": _quantize_4bit,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_4bit.out": _dequantize_4bit_out,
    "gemm_4bit": _gemm_4bit,
    "gemv_4bit": _gemv_4bit,
    "gemv_4bit.out": _gemv_4bit_out,
}


class _FusedMatMul4Bit:
    """Replaces bitsandbytes' autograd.Function by the fused product, whose backward is also fused."""

    @staticmethod
    def apply(x: Tensor, packed: Tensor, out: Tensor | None, bias: Tensor | None, state: Any) -> Tensor:
        scales = _scales(state.absmax)
        if state.nested:
            if state.state2.blocksize != _C.NESTED_BLOCK:
                raise NotImplementedError(
                    f"nested blocks of {state.state2.blocksize} scales: only {_C.NESTED_BLOCK} are supported"
                )
            scales = _scales(state.absmax, state.state2.absmax, state.offset)
        y = ops.forward(
            x, _bytes(packed.detach()), *scales, list(state.shape), state.quant_type, state.blocksize, bias=bias
        )
        return y if out is None else out.copy_(y)


def _keep_weights(weight: Tensor, state: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """Replaces the repacking for CPU inference, which is lossy and which qlora's kernels do not need."""
    return weight, state


class Acceleration:
    """Handle of :func:`accelerate`; :meth:`undo` restores bitsandbytes. Also a context manager.

    There is only one: further calls of :func:`accelerate` share it, and the last ``undo`` restores bitsandbytes.
    """

    active: "Acceleration | None" = None

    def __init__(self) -> None:
        self._users = 0
        from bitsandbytes.autograd import _functions
        from bitsandbytes.nn import modules

        self._library: torch.library.Library | None = torch.library.Library("bitsandbytes", "IMPL")  # noqa: TOR901
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, kernel in _KERNELS.items():
                for key in _dispatch_keys():
                    self._library.impl(name, kernel, key, allow_override=True)
        self._replaced = [
            (_functions, "MatMul4Bit", _functions.MatMul4Bit),
            (modules, "_convert_weight_packed_for_cpu", modules._convert_weight_packed_for_cpu),
        ]
        _functions.MatMul4Bit = _FusedMatMul4Bit
        modules._convert_weight_packed_for_cpu = _keep_weights

    def undo(self) -> None:
        """Restores bitsandbytes' own kernels once every user has called it. Weights do not change."""
        self._users -= 1
        if self._users > 0:
            return
        Acceleration.active = None
        for module, name, value in self._replaced:
            setattr(module, name, value)
        self._replaced = []
        if self._library is not None:
            self._library._destroy()
            self._library = None

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _dispatch_keys() -> Iterator[str]:
    yield "CPU"
    if has_cuda_ops():
        yield "CUDA"


def accelerate() -> Acceleration:
    """Runs bitsandbytes' 4-bit operators on qlora's kernels from now on, in the whole process.

    These are ``quantize_4bit``, ``dequantize_4bit``, ``gemv_4bit`` and ``gemm_4bit``, and so ``Linear4bit``, which
    trains through one fused forward and backward. It covers the CPU, and CUDA if this build has CUDA kernels. In eval
    mode on the CPU weights are no longer repacked, so the saved weights are those that were loaded.

    Returns a handle whose ``undo()`` restores bitsandbytes. Raises ImportError if bitsandbytes is not installed.
    """
    if Acceleration.active is None:
        Acceleration.active = Acceleration()
    Acceleration.active._users += 1
    return Acceleration.active
