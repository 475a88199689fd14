"""QLoRAConfig: how ``from_pretrained`` quantizes a model."""

from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora.integrations import METHOD
from qlora.ops import FLOAT_DTYPES, check_format


class QLoRAConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model; a saved model has this config in its ``config.json``.

    Args:
        quant_type, double_quant, block_size: the format, see :func:`qlora.quantize`.
        compute_dtype: dtype of the products: "float32", "bfloat16" or "float16"; None takes the dtype of activations.
        skip_modules: layers to leave as they are, besides the output head: whole names, prefixes or suffixes.
        calibration: "default" or a list of texts: after loading, calibrates the weights (:func:`qlora.calibrate`) with
            the model's own tokenizer. Not stored with a saved model.
        calibration_tokens: how many tokens of it to use.
        checkpoint_format: "qlora", or "bitsandbytes" for the layout of that library's checkpoints.

    Raises ValueError with the value and the rule.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        checkpoint_format: str = "qlora",
        calibration: str | list[str] | None = None,
        calibration_tokens: int = 16384,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ValueError(f"QLoRAConfig has no option {sorted(kwargs)}")
        check_format(quant_type, block_size)
        if checkpoint_format not in ("qlora", "bitsandbytes"):
            raise ValueError(f"checkpoint_format='{checkpoint_format}' must be qlora or bitsandbytes")
        self.quant_method = METHOD
        self.quant_type, self.double_quant, self.block_size = quant_type, double_quant, block_size
        self.compute_dtype = _dtype_name(compute_dtype)
        if isinstance(skip_modules, str):
            raise ValueError(f"skip_modules='{skip_modules}' must be a list of names: ['{skip_modules}']")
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.checkpoint_format = checkpoint_format
        if isinstance(calibration, str) and calibration != "default":
            raise ValueError(f"calibration='{calibration[:40]}' must be 'default' or a list of texts: [text]")
        if calibration is not None:
            self.calibration, self.calibration_tokens = calibration, calibration_tokens

    # Only while a model loads, so that a saved config holds no texts.
    calibration: str | list[str] | None = None
    calibration_tokens: int = 16384

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and getattr(torch, name, None) not in FLOAT_DTYPES:
        raise ValueError(f"compute_dtype={dtype} must be float32, bfloat16 or float16")
    return name
