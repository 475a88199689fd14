"""transformers integration: ``from_pretrained(…, quantization_config=qlora.QLoRAConfig())`` loads 4-bit models.

Such models can be saved and reloaded. transformers has no entry points for quantizers, so ``import qlora`` registers
this one when transformers is imported (:mod:`qlora.integrations.registration`).
"""

import logging
import re
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
from qlora.integrations import METHOD
from qlora.nn import Embedding4bit, Experts4bit, Linear4bit
from qlora.nn.borrowing import borrowed
from qlora.nn.experts4bit import holds_experts, why_not_experts
from qlora.nn.linear4bit import dense_linear
from qlora.nn.packed import STATISTICS
from qlora.nn.replacing import head_names, replace_module, why_not_plain
from qlora.ops import FLOAT_DTYPES, check_format
from qlora.weight import QuantizedWeight, quantize

logger = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"
# Names in a bitsandbytes checkpoint: the weight and its statistics.
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
    """How ``from_pretrained`` quantizes a model; a saved model has this config in its ``config.json``.

    Args:
        quant_type, double_quant, block_size: the format, see :func:`qlora.quantize`.
        compute_dtype: dtype of the products: "float32", "bfloat16" or "float16"; None takes the dtype of activations.
        skip_modules: layers to leave as they are, besides the output head: whole names, prefixes or suffixes.
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

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        return None if self.compute_dtype is None else getattr(torch, self.compute_dtype)


def _dtype_name(dtype: torch.dtype | str | None) -> str | None:
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    if name not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f"compute_dtype={dtype} must be float32, bfloat16 or float16")
    return name


class Quantize(ConversionOps):
    """Converts a dense weight of the checkpoint into the tensors of its 4-bit layer."""

    def __init__(self, hf_quantizer: "QLoRAQuantizer") -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any | None = None, **kwargs: Any) -> dict[str, Tensor]:
        assert model is not None
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            dense = dense if dense.dtype in FLOAT_DTYPES else dense.float()
            module, leaf = get_module_from_name(model, name)
            prefix = name.removesuffix(leaf)
            if isinstance(module, Experts4bit):
                tensors = module.quantize(dense)
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


class Identity(ConversionOps):
    """No conversion: 4-bit layers are saved as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return input_dict

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class DeserializeBitsandbytes(ConversionOps):
    """Converts the entries of a bitsandbytes layer into the tensors of Linear4bit, bit for bit."""

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


def layer_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a Linear4bit, by their names in its state dict."""
    n, k = weight.shape
    packed = weight.packed.view(n, k // 2) if k % 2 == 0 else weight.packed
    return {"weight": packed, **{name: getattr(weight, name) for name in STATISTICS}}


class QLoRAQuantizer(HfQuantizer):
    """The quantizer that transformers calls to load and save models."""

    quantization_config: QLoRAConfig

    def __init__(self, quantization_config: QLoRAConfig, **kwargs: Any) -> None:
        super().__init__(copy(quantization_config), **kwargs)  # the caller may reuse the original
        self.quantized_names: set[str] = set()
        self.has_adapters = False  # prepare_model has put trainable adapters into the model
        self.state_to_save: dict[str, Tensor] | None = None  # for export in another format
        if self._reads_bitsandbytes:
            self.serialized_names = {"weight": list(_BNB_NAMES)}

    @property
    def _reads_bitsandbytes(self) -> bool:
        return self.pre_quantized and self.quantization_config.checkpoint_format == "bitsandbytes"

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # transformers also asks for weights that are already 4-bit; for those False makes it check their shapes.
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
        # transformers calls this when it saves a model, before it writes the config.
        if self.state_to_save is None:
            self._check_what_is_saved(model)
        return self.state_to_save, {}

    def _check_what_is_saved(self, model: Any) -> None:
        """Removes the quantization config from a model that another library has made dense.

        Raises ValueError if only some layers have become dense, because such a model could not be read back.
        """
        now = {name for name, _ in quantized_layers(model)}
        if not now:
            self.remove_quantization_config(model)
        elif now != self.quantized_names:
            changed = sorted(now ^ self.quantized_names)
            raise ValueError(
                f"save_pretrained: {len(changed)} layers differ from the quantization config, e.g. {changed[:3]}: a"
                " model with only some layers in 4 bit cannot be read back. Merge adapters with"
                " qlora.merge_and_unload(model), which makes all layers dense, or with requantize=True keeps all 4-bit"
            )

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
    def is_qat_trainable(self) -> bool:
        return self.has_adapters  # without this, Trainer refuses 4-bit models that are not PeftModels

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
        self._tell_unknown_names(model)
        left_dense = self._left_dense(model, skip)
        quantized = 0
        for name, module in list(model.named_modules()):
            if isinstance(module, Linear4bit | Experts4bit) or not should_convert_module(name, skip):
                continue
            if name in left_dense:
                continue
            if holds_experts(module):
                self._check(why_not_experts(module), name, module)
                layer: nn.Module = Experts4bit.from_experts(
                    module, options.quant_type, options.double_quant, options.block_size
                )
            elif isinstance(module, nn.Linear | Conv1D):
                kind: type[nn.Module] = Conv1D if isinstance(module, Conv1D) else nn.Linear
                self._check(why_not_plain(module, kind), name, module)
                linear = dense_linear(module.weight.t(), module.bias) if isinstance(module, Conv1D) else module
                layer = Linear4bit.from_linear(linear, options.quant_type, options.double_quant, options.block_size)
                layer.compute_dtype, layer.dense_class = options.torch_compute_dtype, kind
            else:
                continue
            vars(layer)["_is_hf_initialized"] = True  # transformers must not fill missing tensors: they are an error
            replace_module(model, module, layer)
            quantized += 1
        if quantized == 0:
            raise ValueError(f"{type(model).__name__} has no layer to quantize; these are skipped: {sorted(skip)}")
        if not self.pre_quantized:
            self._quantize_what_the_file_holds(model)
        return model

    def _quantize_what_the_file_holds(self, model: Any) -> None:
        """Quantizes weights from the checkpoint's dtype, not the model's.

        So the 4-bit base is the same for every compute dtype, and an adapter can be used with another than its own.
        """
        plan_of = model._get_dtype_plan
        names = [
            f"{name}.{weight}"
            for name, module in quantized_layers(model)
            for weight in (module.weight_names if isinstance(module, Experts4bit) else ["weight"])
        ]
        model._get_dtype_plan = lambda dtype: {**plan_of(dtype), **dict.fromkeys(names)}  # None means no cast

    def _tell_unknown_names(self, model: Any) -> None:
        names = [name for name, _ in model.named_modules()]
        for wanted in self.quantization_config.skip_modules or ():
            if all(should_convert_module(name, [wanted]) for name in names):
                logger.warning("skip_modules: '%s' matches no module of %s", wanted, type(model).__name__)

    def _left_dense(self, model: Any, skip: list[str]) -> set[str]:
        """Names of layers outside skip_modules that stay dense: heads, and layers whose weight other code reads.

        Raises ValueError for such a layer in a bitsandbytes checkpoint.
        """
        candidates = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and should_convert_module(name, skip)
        ]
        readers = borrowed(model, candidates)
        if self._reads_bitsandbytes:  # the checkpoint determines which layers are 4-bit
            for name, reader in readers.items():
                self._check(f"the code of {reader} reads its weight", name, model.get_submodule(name))
            return set()
        if readers:
            logger.warning(
                "left dense, because model code reads their weights: %s",
                ", ".join(f"{name} (by {reader})" for name, reader in list(readers.items())[:5])
                + (f" and {len(readers) - 5} more" if len(readers) > 5 else ""),
            )
        return set(readers) | head_names(model)

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
        vars(model).pop("_get_dtype_plan", None)
        self.quantization_config.checkpoint_format = "qlora"
        self.quantized_names = {name for name, _ in quantized_layers(model)}
        # 4-bit layers are saved under the model's own names, because converters cannot split or join packed rows.
        packed = [tensor for name, module in quantized_layers(model) for tensor, _ in _own_tensors(name, module)]
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            model._weight_conversions = [conversion for conversion in conversions if not _concerns(conversion, packed)]
        for _, module in quantized_layers(model):
            module.requires_grad_(False)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
        # The config of a saved model stores the dtype as a string.
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        make_dense(model, wanted)
        return model


def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replaces all 4-bit layers by dense ones, in ``dtype`` (default: their dtype before quantization)."""
    for module in list(model.modules()):
        if isinstance(module, Experts4bit):
            replace_module(model, module, module.to_experts(dtype))
        elif isinstance(module, Linear4bit):
            replace_module(model, module, module.to_linear(dtype))
        elif isinstance(module, Embedding4bit):
            replace_module(model, module, module.to_embedding(dtype))


def quantized_layers(model: Any) -> Iterator[tuple[str, Linear4bit | Experts4bit]]:
    """All 4-bit layers of a model, by name."""
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


def _concerns(conversion: Any, packed: list[str]) -> bool:
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
    patterns = [target.replace(r"\1", ".*").replace("*.", r"\d+\.") for target in conversion.target_patterns]
    return any(re.search(rf"(^|\.){pattern}(\.|$)", name) for pattern in patterns for name in packed)
