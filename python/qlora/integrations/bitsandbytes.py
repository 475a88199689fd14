"""bitsandbytes: its checkpoints are read and written without it, and its own code runs on our kernels.

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
    """The config of a bitsandbytes 4-bit checkpoint, rewritten so that transformers loads it with our layers::

        config = qlora.integrations.bitsandbytes.checkpoint_config(path)
        model = AutoModelForCausalLM.from_pretrained(path, config=config)

    Arguments as ``AutoConfig.from_pretrained``. Raises ValueError if it is no bitsandbytes checkpoint, or one of 8 bit.
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
        raise ValueError(f"{path} is a bitsandbytes checkpoint in 8 bit (LLM.int8): only those in 4 bit can be read")
    if not options.get("load_in_4bit"):
        raise ValueError(f"{path} says neither load_in_4bit nor load_in_8bit: it is no bitsandbytes checkpoint")
    compute = str(options.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch.")
    return {
        "quant_method": "qlora",
        "checkpoint_format": _METHOD,
        "quant_type": options.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(options.get("bnb_4bit_use_double_quant", False)),
        "block_size": int(options.get("bnb_4bit_blocksize", 64)),
        # float32 is that library's way of saying nothing: its layers then take the dtype of the input.
        "compute_dtype": None if compute == "float32" else compute,
        "skip_modules": options.get("llm_int8_skip_modules"),
    }


def export_checkpoint(model: Any, path: str | Path, quant_storage: torch.dtype = torch.uint8, **kwargs: Any) -> None:
    """Saves a transformers model with our layers as bitsandbytes and transformers would save theirs, byte for byte.

    Args:
        quant_storage: dtype in which the packed weights are declared.
        kwargs: of ``save_pretrained``.

    Raises ValueError for what that library does not know (int4, experts, several formats in one model), and for a model
    that was not loaded with a QLoRAConfig.
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
            raise ValueError(f"{name} holds experts in 4 bit, which bitsandbytes leaves dense: it cannot be exported")
        weights[name] = layer.quantized_weight
    formats = {(w.quant_type, w.double_quant) for w in weights.values()}
    if len(formats) != 1:
        raise ValueError(f"the model has layers in {sorted(formats)}: a bitsandbytes checkpoint has one format")
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
    """Whether a folder holds a model that bitsandbytes has quantized."""
    with suppress(OSError, ValueError):
        options = json.loads((Path(path) / "config.json").read_text()).get("quantization_config") or {}
        return options.get("quant_method") == _METHOD or bool(options.get("load_in_4bit"))
    return False


# ---- its operators on our kernels ----


def _bytes(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.uint8).flatten()


def _scales(
    absmax: Tensor, nested: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The three statistics as our operators take them: other tools store those that are no codes in 16 bit."""
    if nested is None or offset is None:
        return absmax.float(), None, None
    return absmax, nested.float(), offset.float().reshape(1)


def _check_map(code: Tensor) -> None:
    """Raises ValueError if the scales' codes are not bitsandbytes' own dynamic map, the only one that we know."""
    if not torch.equal(code.float(), table(_C.dynamic_map(), code)):
        raise ValueError("absmax_code is not the dynamic map of 8 bit: these scales cannot be decoded")


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
        if absmax_code.device.type == "cpu":  # elsewhere looking at it would wait for the device
            _check_map(absmax_code)
        scales = _scales(absmax_8bit, absmax, absmax_offset)
    return ops.forward(x, _bytes(packed), *scales, shape, quant_type, blocksize, bias=bias)


def _gemv_4bit(x: Tensor, packed: Tensor, shape: list[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    if absmax.dtype != torch.float32:
        raise ValueError(
            "these weights were repacked for bitsandbytes' CPU inference, which rounds their scales: call"
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
    """In the place of bitsandbytes' autograd.Function: the fused product, whose backward is fused as well."""

    @staticmethod
    def apply(x: Tensor, packed: Tensor, out: Tensor | None, bias: Tensor | None, state: Any) -> Tensor:
        scales = _scales(state.absmax)
        if state.nested:
            if state.state2.blocksize != _C.NESTED_BLOCK:
                raise NotImplementedError(
                    f"nested blocks of {state.state2.blocksize} scales; {_C.NESTED_BLOCK} are known"
                )
            scales = _scales(state.absmax, state.state2.absmax, state.offset)
        y = ops.forward(
            x, _bytes(packed.detach()), *scales, list(state.shape), state.quant_type, state.blocksize, bias=bias
        )
        return y if out is None else out.copy_(y)


def _keep_weights(weight: Tensor, state: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
    """In the place of the repacking for CPU inference, which is lossy and which our kernels need not."""
    return weight, state


class Acceleration:
    """What :func:`accelerate` has changed; :meth:`undo` takes it back. Also a context manager.

    There is one of them: who asks for it while it is on shares it, and the last ``undo`` takes it back.
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
        """bitsandbytes runs on its own kernels again, once all who asked are done. Weights are as they were."""
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
    """From now on bitsandbytes' 4-bit operators in this process run on our kernels.

    ``quantize_4bit``, ``dequantize_4bit``, ``gemv_4bit``, ``gemm_4bit`` and with them ``Linear4bit``, in training
    through one fused operation forward and backward, on the CPU, and on CUDA where this build has kernels for it. In
    eval mode on the CPU weights are no longer repacked: what is saved afterwards is what was loaded.

    Returns a handle whose ``undo()`` restores bitsandbytes. Raises ImportError if bitsandbytes is not installed.
    """
    if Acceleration.active is None:
        Acceleration.active = Acceleration()
    Acceleration.active._users += 1
    return Acceleration.active
