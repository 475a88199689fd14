"""Conversions while a checkpoint loads: dense weights to 4 bit, bitsandbytes' entries to ours."""

import re
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora.integrations.transformers.layers import layer_tensors
from qlora.integrations.transformers.parallel import refuse_sharded
from qlora.nn import Experts4bit, Linear4bit
from qlora.nn.offload import mapped_copy, release_heap
from qlora.nn.packed import STATISTICS
from qlora.ops import FLOAT_DTYPES
from qlora.weight import QuantizedWeight, quantize

_EXTRA_STATE = "_extra_state"


class Quantize(ConversionOps):
    """Converts a dense weight of the checkpoint into the tensors of its 4-bit layer."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any | None = None, **kwargs: Any) -> dict[str, Tensor]:
        assert model is not None
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            dense = dense if dense.dtype in FLOAT_DTYPES else dense.float()
            module, leaf = get_module_from_name(model, name)
            refuse_sharded(name, getattr(module, leaf))
            prefix = name.removesuffix(leaf)
            if isinstance(module, Experts4bit):
                tensors = module.quantize(dense)
                folder = self.hf_quantizer.quantization_config.offload_folder
                if folder is not None:
                    tensors["weight"] = mapped_copy(tensors["weight"], folder)
                    release_heap()
                result[name] = tensors["weight"]
                result |= {f"{name}_{statistic}": tensors[statistic] for statistic in STATISTICS}
                continue
            if module.dense_class is Conv1D:  # the checkpoint stores its weight as (in, out)
                dense = dense.t().contiguous()
            options = self.hf_quantizer.quantization_config
            weight = quantize(dense, options.quant_type, options.block_size, options.double_quant)
            result |= {prefix + key: tensor for key, tensor in layer_tensors(weight).items()}
            result[prefix + _EXTRA_STATE] = module.get_extra_state()
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        return Identity()


class DequantizeMxfp4(ConversionOps):
    """Converts the experts of an MXFP4 checkpoint to bfloat16, which holds their values exactly."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        assert full_layer_name is not None
        parts = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        by_kind = {kind: tensor for name, tensor in parts.items() for kind in ("blocks", "scales") if kind in name}
        if len(by_kind) != 2:
            raise ValueError(
                f"{full_layer_name}: the checkpoint has {sorted(parts)}, but MXFP4 needs blocks and scales"
            )
        dense = convert_moe_packed_tensors(by_kind["blocks"], by_kind["scales"], dtype=torch.bfloat16)
        return {full_layer_name: dense}

    @property
    def reverse_op(self) -> ConversionOps:
        return Identity()


class Identity(ConversionOps):
    """No conversion: 4-bit layers are saved as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class DeserializeBitsandbytes(ConversionOps):
    """Converts the entries of a bitsandbytes layer into the tensors of Linear4bit, bit for bit."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        assert full_layer_name is not None
        entries = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        module, _ = get_module_from_name(model, full_layer_name)
        if not isinstance(module, Linear4bit):
            if len(entries) > 1:
                raise ValueError(f"{full_layer_name} is 4-bit in the checkpoint, but dense in the model")
            return entries
        if len(entries) == 1:
            raise ValueError(
                f"{full_layer_name} is dense in the checkpoint, or its statistics are missing: name the layer in"
                " skip_modules if it is meant to be dense"
            )
        weight = QuantizedWeight.from_bnb(entries)
        if weight.shape != (module.out_features, module.in_features):
            raise ValueError(
                f"{full_layer_name} has shape {weight.shape} in the checkpoint: the model needs"
                f" {(module.out_features, module.in_features)}"
            )
        module.adopt(weight)  # takes over the format, which may differ between layers; the caller loads the tensors
        return layer_tensors(weight) | {_EXTRA_STATE: module.get_extra_state()}

    @property
    def reverse_op(self) -> ConversionOps:
        return Identity()


def concerns(conversion: Any, packed: list[str]) -> bool:
    """Whether a weight conversion creates one of the tensors ``packed`` from others, for example by splitting."""
    if isinstance(conversion, Quantize | DeserializeBitsandbytes):
        return True
    operations = getattr(conversion, "operations", None)
    if operations is None:
        return False
    if any(isinstance(operation, DeserializeBitsandbytes) for operation in operations):
        return True
    # A pattern matches whole parts of a name, e.g. "mlp.experts.gate_up_proj"; a star is a number, r"\1" is a group
    # of the source pattern.
    targets = [target.lstrip(".") for target in conversion.target_patterns]
    patterns = [target.replace(r"\1", ".*").replace("*.", r"\d+\.") for target in targets]
    return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns for name in packed)
