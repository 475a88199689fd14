"""QLoRAConfig: how ``from_pretrained`` quantizes a model."""

from pathlib import Path
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
        offload_folder: a folder for the packed weights of experts, which are mapped into memory while the model loads
            (:func:`qlora.nn.offload.offload_experts`). Not stored with a saved model.
        checkpoint_format: "qlora"; "bitsandbytes" for the layout of that library's checkpoints; "mxfp4" for gpt-oss
            with experts in MXFP4, which are quantized anew while they load (see :func:`mxfp4_config`).

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
        offload_folder: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("quant_method", None)
        if kwargs:
            raise ValueError(f"QLoRAConfig has no option {sorted(kwargs)}")
        check_format(quant_type, block_size)
        if checkpoint_format not in ("qlora", "bitsandbytes", "mxfp4"):
            raise ValueError(f"checkpoint_format='{checkpoint_format}' must be qlora, bitsandbytes or mxfp4")
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
        if offload_folder is not None:
            self.offload_folder = str(offload_folder)

    # Only while a model loads, so that a saved config holds no texts and no folders.
    offload_folder: str | None = None
    calibration: str | list[str] | None = None
    calibration_tokens: int = 16384

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)


def is_mxfp4(config: Any) -> bool:
    """Whether a model's config says that its checkpoint holds experts in MXFP4, as OpenAI's gpt-oss does."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return str(getattr(method, "value", method)) == "mxfp4"


def mxfp4_config(path: str | Path, **kwargs: Any) -> Any:
    """The config of an MXFP4 checkpoint, changed so that transformers can load it with qlora's layers::

        config = qlora.integrations.transformers.mxfp4_config(path)
        options = qlora.QLoRAConfig(checkpoint_format="mxfp4")
        model = AutoModelForCausalLM.from_pretrained(path, config=config, quantization_config=options)

    Same arguments as ``AutoConfig.from_pretrained``. Raises ValueError for another checkpoint.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **kwargs)
    if not is_mxfp4(config):
        raise ValueError(f"{path} is not an MXFP4 checkpoint: pass quantization_config=qlora.QLoRAConfig()")
    del config.quantization_config  # transformers refuses a second one
    return config


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name is not None and getattr(torch, name, None) not in FLOAT_DTYPES:
        raise ValueError(f"compute_dtype={dtype} must be float32, bfloat16 or float16")
    return name
