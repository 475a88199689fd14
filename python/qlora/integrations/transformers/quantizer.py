"""QLoRAQuantizer: what transformers calls of a quantization method."""

import logging
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qlora.calibration import calibrate
from qlora.distributed import refuse_fsdp1
from qlora.integrations.transformers.config import QLoRAConfig
from qlora.integrations.transformers.conversion import (
    DequantizeMxfp4,
    DeserializeBitsandbytes,
    Quantize,
    concerns,
)
from qlora.integrations.transformers.layers import make_dense, own_tensors, quantized_layers
from qlora.integrations.transformers.parallel import (
    are_local,
    keep_local_experts,
    refuse_tensor_parallel,
)
from qlora.nn import Experts4bit, Linear4bit
from qlora.nn.borrowing import borrowed
from qlora.nn.experts4bit import holds_experts, why_not_experts
from qlora.nn.linear4bit import dense_linear
from qlora.nn.replacing import head_names, replace_module, why_not_plain

logger = logging.getLogger(__name__)

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

    def get_weight_conversions(self) -> list[Any]:
        if self.pre_quantized or self.quantization_config.checkpoint_format != "mxfp4":
            return super().get_weight_conversions()
        # transformers quantizes what these conversions return, because param_needs_quantization() names it.
        return [
            WeightConverter([f"{name}_blocks", f"{name}_scales"], name, [DequantizeMxfp4(self)])
            for name in ("gate_up_proj", "down_proj")
        ]

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
        if any(isinstance(m, Experts4bit) and are_local(m) for _, m in quantized_layers(model)):
            raise ValueError("save_pretrained: each process holds the scales of its own experts only; save adapters")
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
            for name, tensor in own_tensors(layer, module)
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if missing:
            hint = ""
            if any(isinstance(module, Experts4bit) for _, module in quantized_layers(model)):
                hint = '. If its experts are in MXFP4 (gpt-oss), pass QLoRAConfig(checkpoint_format="mxfp4")'
            raise ValueError(f"the checkpoint lacks {len(missing)} tensors of 4-bit layers, e.g. {missing[:3]}{hint}")
        vars(model).pop("_get_dtype_plan", None)
        self.quantization_config.checkpoint_format = "qlora"
        self.quantized_names = {name for name, _ in quantized_layers(model)}
        # 4-bit layers are saved under the model's own names, because converters cannot split or join packed rows.
        packed = [tensor for name, module in quantized_layers(model) for tensor, _ in own_tensors(name, module)]
        conversions = getattr(model, "_weight_conversions", None)
        if conversions:
            model._weight_conversions = [conversion for conversion in conversions if not concerns(conversion, packed)]
        for name, module in quantized_layers(model):
            module.requires_grad_(False)
            for tensor_name, tensor in own_tensors(name, module):
                refuse_tensor_parallel(tensor_name, tensor)
            if isinstance(module, Experts4bit):
                keep_local_experts(module)
        self.quantization_config.__dict__.pop("offload_folder", None)
        self._calibrate(model)
        return model

    def _calibrate(self, model: Any) -> None:
        options: dict[str, Any] = self.quantization_config.__dict__
        texts, tokens = options.pop("calibration", None), options.pop("calibration_tokens", 0)
        if texts is None:
            return
        if self.pre_quantized:
            logger.warning("calibration: the checkpoint is in 4 bit already and keeps its weights")
            return
        report = calibrate(model, texts, tokens=tokens)
        logger.info("calibrated: errors of outputs are %.2f times those of plain quantization", report.error_ratio)

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
        # The config of a saved model stores the dtype as a string.
        wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        make_dense(model, wanted)
        return model
