"""bitsandbytes' 4-bit checkpoints, read and written without that library."""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

_METHOD = "bitsandbytes"


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


def export_checkpoint(
    model: Any,
    path: str | Path,
    quant_storage: torch.dtype = torch.uint8,
    *,
    dense_experts: bool = False,
    **kwargs: Any,
) -> None:
    """Saves a 4-bit model as transformers saves a bitsandbytes model, byte for byte the same.

    Args:
        quant_storage: dtype under which the packed weights are stored.
        dense_experts: replace 4-bit experts in the model by dense ones, as bitsandbytes has them.
        kwargs: passed to ``save_pretrained``.

    Raises ValueError for what bitsandbytes does not have (int4, 4-bit experts, several formats in one model), for
    layers that transformers leaves dense in such a checkpoint (subclasses of nn.Linear, as Falcon's), and for a model
    that was not loaded with a QLoRAConfig.
    """
    from transformers import BitsAndBytesConfig

    from qlora.integrations.transformers import QLoRAQuantizer, make_dense, quantized_layers
    from qlora.nn import Experts4bit

    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, QLoRAQuantizer):
        raise ValueError(f"{type(model).__name__} was not loaded by from_pretrained with a QLoRAConfig")
    if dense_experts:
        make_dense(model, kinds=(Experts4bit,))
    weights = {}
    for name, layer in quantized_layers(model):
        if isinstance(layer, Experts4bit):
            raise ValueError(f"{name} has 4-bit experts, which bitsandbytes keeps dense: it cannot be exported")
        weights[name] = layer.quantized_weight
    _check_classes(model, weights)
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


def _check_classes(model: Any, names: Iterable[str]) -> None:
    """Raises ValueError for a 4-bit layer whose class transformers does not replace by one of bitsandbytes'."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        fresh = type(model)(model.config)
    for name in names:
        layer = fresh.get_submodule(name)
        if type(layer) is not nn.Linear and not isinstance(layer, Conv1D):
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which transformers leaves dense in a bitsandbytes checkpoint, so"
                " it could not be read back: save the model in qlora's format, or dense"
            )


def is_checkpoint(path: str | Path) -> bool:
    """Whether a folder contains a model that bitsandbytes has quantized."""
    with suppress(OSError, ValueError):
        options = json.loads((Path(path) / "config.json").read_text()).get("quantization_config") or {}
        return options.get("quant_method") == _METHOD or bool(options.get("load_in_4bit"))
    return False
