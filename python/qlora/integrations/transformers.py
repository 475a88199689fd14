"""transformers: ``from_pretrained(…, quantization_config=qlora.QLoRAConfig())`` loads, quantizes, saves and reloads.

transformers has no entry points for quantizers: ``import qlora`` registers this one as soon as transformers is imported
(:mod:`qlora.integrations.registration`).
"""

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora.distributed import refuse_fsdp1
from qlora.integrations.registration import METHOD
from qlora.models.prepare import replace_module
from qlora.nn import Experts4bit, Linear4bit
from qlora.nn.experts4bit import holds_experts, why_not_experts
from qlora.nn.linear4bit import dense_linear
from qlora.nn.packed import STATISTICS
from qlora.ops import check_format
from qlora.weight import QuantizedWeight, quantize

_PLAIN_SUBCLASSES = ("FalconLinear",)  # of nn.Linear, whose forward is nothing but x Wᵀ + b
_EXTRA_STATE = "_extra_state"
# Of a bitsandbytes checkpoint: a weight and what belongs to it.
_BNB_NAMES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)


class QLoRAConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes a model, and what ``config.json`` says of one that is saved.

    Args:
        quant_type, double_quant, block_size: the format, see :func:`qlora.quantize`.
        compute_dtype: dtype of the products, "float32", "bfloat16" or "float16"; None: that of the activations.
        skip_modules: layers that stay as they are, by their whole names, their beginnings or their ends, besides the
            output head.
        checkpoint_format: "qlora", or "bitsandbytes" for the layout of that library's checkpoints.

    Raises ValueError naming the value and the rule.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        checkpoint_format: str = "qlora",
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
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.checkpoint_format = checkpoint_format

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"compute_dtype={dtype} must be float32, bfloat16 or float16")
    return name


class Quantize(ConversionOps):
    """A dense weight of the checkpoint to the tensors of its 4-bit layer."""

    def __init__(self, hf_quantizer: "QLoRAQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any | None = None, **kwargs: Any) -> dict[str, Tensor]:
        assert model is not None
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            module, leaf = get_module_from_name(model, name)
            prefix = name.removesuffix(leaf)
            if isinstance(module, Experts4bit):
                tensors = module.quantize(dense)
                result[name] = tensors["weight"]
                result |= {f"{name}_{statistic}": tensors[statistic] for statistic in STATISTICS}
                continue
            if self.hf_quantizer.is_transposed(module):
                dense = dense.t().contiguous()
            options = self.hf_quantizer.quantization_config
            weight = quantize(dense, options.quant_type, options.block_size, options.double_quant)
            result |= {prefix + key: tensor for key, tensor in layer_tensors(weight).items()}
            result[prefix + _EXTRA_STATE] = module.get_extra_state()
        return result

    @property
    def reverse_op(self) -> ConversionOps:
        return Identity()


class Identity(ConversionOps):
    """4-bit layers are saved as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class DeserializeBitsandbytes(ConversionOps):
    """The entries of a bitsandbytes layer to the tensors of ours, bit for bit."""

    def __init__(self, hf_quantizer: "QLoRAQuantizer") -> None:
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
                raise ValueError(f"{full_layer_name} is in 4 bit in the checkpoint: the model keeps this layer dense")
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
        module.adopt(weight)  # its format may differ from layer to layer; the tensors themselves follow
        return layer_tensors(weight) | {_EXTRA_STATE: module.get_extra_state()}

    @property
    def reverse_op(self) -> ConversionOps:
        return Identity()


def layer_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a Linear4bit by their names in its state dict."""
    n, k = weight.shape
    packed = weight.packed.view(n, k // 2) if k % 2 == 0 else weight.packed
    return {"weight": packed, **{name: getattr(weight, name) for name in STATISTICS}}


class QLoRAQuantizer(HfQuantizer):
    """What transformers asks of a quantization method."""

    quantization_config: QLoRAConfig

    def __init__(self, quantization_config: QLoRAConfig, **kwargs: Any) -> None:
        super().__init__(copy(quantization_config), **kwargs)  # the caller's own may load other models
        self._transposed: set[int] = set()
        self.state_to_save: dict[str, Tensor] | None = None  # instead of the model's, for another format
        if self._reads_bitsandbytes:
            self.serialized_names = {"weight": list(_BNB_NAMES)}

    @property
    def _reads_bitsandbytes(self) -> bool:
        return self.pre_quantized and self.quantization_config.checkpoint_format == "bitsandbytes"

    def is_transposed(self, module: nn.Module) -> bool:
        """Whether the checkpoint holds this layer's weight as (in, out), as GPT-2's Conv1D does."""
        return id(module) in self._transposed

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Asked also of weights that are in 4 bit already: then shapes have to fit.
        if self.pre_quantized:
            return False
        module, leaf = get_module_from_name(model, param_name)
        if isinstance(module, Experts4bit):
            return leaf in module.weight_names
        return isinstance(module, Linear4bit) and leaf == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def get_load_operations(self) -> dict:
        return {"deserialize": DeserializeBitsandbytes} if self._reads_bitsandbytes else {}

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        return self.state_to_save, {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        refuse_fsdp1()

    def update_device_map(self, device_map: Any) -> Any:
        return device_map

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        options = self.quantization_config
        skip = self.get_modules_to_not_convert(
            model,
            options.skip_modules,
            model._keep_in_fp32_modules,
            add_default_skips=not self._reads_bitsandbytes,
        )
        quantized = 0
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit | Experts4bit) or not should_convert_module(name, skip):
                continue
            if holds_experts(module):
                self._check(why_not_experts(module), name, module)
                layer: nn.Module = Experts4bit.from_experts(
                    module, options.quant_type, options.double_quant, options.block_size
                )
            elif isinstance(module, nn.Linear | Conv1D):
                is_plain = type(module) in (nn.Linear, Conv1D) or type(module).__name__ in _PLAIN_SUBCLASSES
                self._check(None if is_plain else "it is a linear layer with a forward of its own", name, module)
                linear = dense_linear(module.weight.t(), module.bias) if isinstance(module, Conv1D) else module
                layer = Linear4bit.from_linear(linear, options.quant_type, options.double_quant, options.block_size)
                layer.compute_dtype = options.torch_compute_dtype
                if isinstance(module, Conv1D):
                    self._transposed.add(id(layer))
            else:
                continue
            vars(layer)["_is_hf_initialized"] = True  # what is missing is an error, not for filling
            replace_module(model, module, layer)
            quantized += 1
        if quantized == 0:
            raise ValueError(f"{type(model).__name__} has no layer to quantize; skipped are {sorted(skip)}")
        return model

    def _check(self, reason: str | None, name: str, module: nn.Module) -> None:
        if reason is not None:
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be quantized: {reason}. Name it in skip_modules to leave it"
                " as it is"
            )

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> nn.Module:
        missing = [
            name
            for layer, module in quantized_layers(model)
            for name, tensor in _own_tensors(layer, module)
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of 4-bit layers, e.g. {missing[:3]}")
        self.quantization_config.checkpoint_format = "qlora"
        # Fused experts are saved as they are: their packed rows are no longer what a converter would split.
        experts = [name for name, module in quantized_layers(model) if isinstance(module, Experts4bit)]
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            model._weight_conversions = [conversion for conversion in conversions if not _concerns(conversion, experts)]
        for _, module in quantized_layers(model):
            module.requires_grad_(False)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
        # The config of a saved model has it as a string.
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for _, module in list(quantized_layers(model)):
            dense = module.to_experts(wanted) if isinstance(module, Experts4bit) else module.to_linear(wanted)
            replace_module(model, module, dense)
        return model


def quantized_layers(model: Any) -> Iterator[tuple[str, Linear4bit | Experts4bit]]:
    """All 4-bit layers of a model by name."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit | Experts4bit):
            yield name, module


def _own_tensors(name: str, module: Linear4bit | Experts4bit) -> Iterator[tuple[str, Tensor]]:
    weights = module.weight_names if isinstance(module, Experts4bit) else ["weight"]
    for weight in weights:
        yield f"{name}.{weight}", getattr(module, weight)
        for statistic in STATISTICS:
            leaf = f"{weight}_{statistic}" if isinstance(module, Experts4bit) else statistic
            yield f"{name}.{leaf}", getattr(module, leaf)


def _concerns(conversion: Any, experts: list[str]) -> bool:
    """Whether a weight conversion makes a parameter of modules of experts that are in 4 bit now."""
    if isinstance(conversion, Quantize | DeserializeBitsandbytes):
        return True
    operations = getattr(conversion, "operations", None)
    if operations is None:
        return False
    if any(isinstance(operation, DeserializeBitsandbytes) for operation in operations):
        return True
    targets = [pattern.rpartition(".")[2] for pattern in conversion.target_patterns]
    return bool(experts) and any(target in ("gate_up_proj", "up_proj", "down_proj") for target in targets)
