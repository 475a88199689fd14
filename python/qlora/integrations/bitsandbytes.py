"""Reads and writes bitsandbytes checkpoints without that library, and runs its operators on qlora's kernels.

``checkpoint_config`` and ``export_checkpoint`` need transformers, ``accelerate`` needs bitsandbytes.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from qlora import _C, ops
from qlora._load import has_cuda_ops
from qlora.tables import table

_METHOD = "bitsandbytes"


# ---- checkpoints ----


def checkpoint_config(path: str | Path, **kwargs: Any) -> Any:
    """The config of a bitsandbytes 4-bit checkpoint, changed so that transformers loads it with qlora's layers::

        config = qlora.integrations.bitsandbytes.checkpoint_config(path)
        model = AutoModelForCausalLM.from_pretrained(path, config=config)

    Same arguments as ``AutoConfig.from_pretrained``. Raises ValueError for an 8-bit checkpoint of bitsandbytes, and for
    a folder that is not a bitsandbytes checkpoint.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **kwargs)
    options = getattr(config, "quantization_config", None)
    if options is None:
        raise ValueError(f"{path} is not quantized: pass quantization_config=qlora.QLoRAConfig() to from_pretrained")
    config.quantization_config = _translate(dict(options), path)
    return config


def _translate(options: dict[str, Any], path: str | Path) -> dict[str, Any]:
    method = options.get("quant_method", _METHOD)
    if str(getattr(method, "value", method)) != _METHOD:
        raise ValueError(f"{path} is quantized by '{method}': this reads checkpoints of bitsandbytes")
    if options.get("load_in_8bit"):
        raise ValueError(f"{path} is an 8-bit bitsandbytes checkpoint (LLM.int8): only 4-bit ones can be read")
    if not options.get("load_in_4bit"):
        raise ValueError(f"{path} sets neither load_in_4bit nor load_in_8bit: it is not a bitsandbytes checkpoint")
    compute = str(options.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    return {
        "quant_method": "qlora",
        "checkpoint_format": _METHOD,
        "quant_type": options.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(options.get("bnb_4bit_use_double_quant", False)),
        "block_size": int(options.get("bnb_4bit_blocksize", 64)),
        # float32 means unset in that library: its layers then take the dtype of the input.
        "compute_dtype": None if compute == "float32" else compute,
        "skip_modules": options.get("llm_int8_skip_modules"),
    }


def export_checkpoint(model: Any, path: str | Path, quant_storage: torch.dtype = torch.uint8, **kwargs: Any) -> None:
    """Saves a 4-bit model as transformers saves a bitsandbytes model, byte for byte the same.

    Args:
        quant_storage: dtype under which the packed weights are stored.
        kwargs: passed to ``save_pretrained``.

    Raises ValueError for what bitsandbytes does not have (int4, 4-bit experts, several formats in one model), and for a
    model that was not loaded with a QLoRAConfig.
    """
    from transformers import BitsAndBytesConfig

    from qlora.integrations.transformers import QLoRAQuantizer, quantized_layers
    from qlora.nn import Experts4bit

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QLoRAQuantizer):
        raise ValueError(f"{type(model).__name__} was not loaded by from_pretrained with a QLoRAConfig")
    weights = {}
    for name, layer in quantized_layers(model):
        if isinstance(layer, Experts4bit):
            raise ValueError(f"{name} has 4-bit experts, which bitsandbytes keeps dense: it cannot be exported")
        weights[name] = layer.quantized_weight
    formats = {(w.quant_type, w.double_quant) for w in weights.values()}
    if len(formats) != 1:
        raise ValueError(f"the model has layers in {sorted(formats)}: a bitsandbytes checkpoint has only one format")
    quant_type, double_quant = formats.pop()
    state = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] not in weights or k.endswith(".bias")}
    for name, weight in weights.items():
        entries = weight.to_bnb(f"{name}.weight")
        entries[f"{name}.weight"] = entries[f"{name}.weight"].flatten().view(quant_storage).unsqueeze(1)
        state |= entries
    ours = model.config.quantization_config
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=ours.compute_dtype or "float32",
        bnb_4bit_quant_storage=quant_storage,
        llm_int8_skip_modules=ours.skip_modules,
    )
    model.config.quantization_config = theirs
    quantizer.state_to_save = state
    try:
        model.save_pretrained(path, **kwargs)
    finally:
        model.config.quantization_config = ours
        quantizer.state_to_save = None


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder contains a model that bitsandbytes has quantized."""
    with suppress(OSError, ValueError):
        options = json.loads((Path(path) / "config.json").read_text()).get("quantization_config") or {}
        return options.get("quant_method") == _METHOD or bool(options.get("load_in_4bit"))
    return False


# ---- bitsandbytes operators on qlora's kernels ----


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
