"""Merges the adapters of a whole model, qlora's or PEFT's, into its weights."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.adapters.files import allow_saving
from qlora.adapters.masters import back_to_16_bit
from qlora.calibration.blocks import find_blocks
from qlora.calibration.model import MERGED, calibrate_merged
from qlora.calibration.texts import WINDOW, Windows, windows_of
from qlora.nn import MergeReport, QLoRALinear
from qlora.nn.finding import qlora_layers
from qlora.nn.merging import MergeInto, merge_report
from qlora.nn.replacing import replace_module
from qlora.weight import QuantizedWeight

_WORTH_SAYING = 0.9  # warns if less than this share of the adapter is kept


class Merged(NamedTuple):
    """Result of :func:`merge_and_unload`."""

    model: nn.Module
    reports: dict[str, MergeReport]  # errors of the merged weights, by layer name in ``model``

    @property
    def adapter_kept(self) -> float:
        """The share of the adapter's change that the merged weights keep: the median over layers."""
        return median(report.adapter_kept for report in self.reports.values()) if self.reports else 1.0


def merge_and_unload(
    model: nn.Module,
    name: str | Sequence[str] | None = None,
    *,
    requantize: bool = False,
    dtype: torch.dtype | None = None,
    search_scales: bool = False,
    safe_merge: bool = False,
    calibration: str | Sequence[str] | Tensor | None = None,
    tokenizer: Any = None,
    tokens: int = 16384,
) -> Merged:
    """Merges each adapter into its layer and removes it. Takes a model of :func:`qlora.prepare_model` or a PeftModel.

    Without ``requantize`` the whole model becomes dense, including embeddings, experts and 4-bit layers without this
    adapter, and can be saved and loaded as a dense model. With ``requantize`` merged layers are 4-bit again. Rounding
    each weight by itself then undoes most of a small adapter; ``calibration``, best with text like the training data,
    keeps most of it. A warning says how much is kept.

    Args:
        name: the adapter (default: each layer's active one); for a PeftModel also a list of several.
        requantize, dtype, search_scales: see :class:`qlora.nn.merging.MergeInto`.
        safe_merge: for a PeftModel: raise an error if an adapter makes a weight nan or inf.
        calibration, tokenizer, tokens: with ``requantize``, the text for :func:`qlora.calibrate`.

    Works in place; for a PeftModel it returns the model that was wrapped. Raises ValueError, before anything changes,
    if no layer has the adapter or the calibration's text does not suffice. If the calibration fails later (activations
    that are nan), the layers are merged without it.
    """
    from qlora.integrations.transformers import make_dense

    into = MergeInto(requantize, dtype, search_scales)
    originals, windows = {}, None
    if calibration is not None:  # whatever is wrong with the text must be said before anything changes
        originals = _originals(model, requantize)
        find_blocks(model)
        windows = windows_of(calibration, tokenizer, model, tokens, WINDOW)
    if hasattr(model, "peft_config"):
        from qlora.integrations.peft import merge_peft

        names = [name] if isinstance(name, str) else None if name is None else list(name)
        merged, reports = merge_peft(model, into, names, safe_merge)
        back_to_16_bit(merged)
    else:
        if safe_merge or not (name is None or isinstance(name, str)):
            raise ValueError("safe_merge and several adapters need a PeftModel: this model has no PEFT adapters")
        merged, reports = model, _merge_prepared(model, into, name)
        if not requantize:
            allow_saving(model)
    quantizer: Any = getattr(merged, "hf_quantizer", None)
    if not requantize:
        make_dense(merged, dtype)
        if quantizer is not None:
            quantizer.remove_quantization_config(merged)
    else:
        vars(merged)[MERGED] = True
        if quantizer is not None:
            quantizer.has_adapters = False
            allow_saving(merged)
    if windows is not None:
        reports |= _calibrated(merged, reports, originals, windows)
    result = Merged(merged, reports)
    if requantize and not result.adapter_kept >= _WORTH_SAYING:
        warnings.warn(
            f"merged into 4 bit, the weights keep {result.adapter_kept:.0%} of what the adapter changes (median of"
            f" {len(reports)} layers): rounding to the base's grid undoes the rest. Pass calibration= with text like"
            " the training data, merge without requantize, or keep the adapter beside its base",
            stacklevel=2,
        )
    return result


def _merge_prepared(model: nn.Module, into: MergeInto, name: str | None) -> dict[str, MergeReport]:
    layers = qlora_layers(model)
    adapter_of = {n: name or layer.active_adapter for n, layer in layers.items()}
    merged = {n for n, layer in layers.items() if adapter_of[n] in layer.adapters}
    if not merged:
        raise ValueError(f"{type(model).__name__} has no QLoRALinear with the adapter {name!r}: nothing to merge")
    options: dict[str, Any] = {
        "requantize": into.requantize,
        "dtype": into.dtype,
        "search_scales": into.search_scales,
    }
    reports = {n: layer.merge(adapter_of[n], **options) for n, layer in layers.items() if n in merged}
    for n, layer in layers.items():
        replace_module(model, layer, layer.merged_linear() if n in merged else layer.base)
    return reports


class _Original(NamedTuple):
    """An adapted layer before its merge, which stays readable after it."""

    base: QuantizedWeight
    exact: Callable[[], Tensor]  # base + adapter, float32 (out, in)


def _originals(model: Any, requantize: bool) -> dict[str, _Original]:
    """The adapted layers by their names in the merged model. Raises ValueError for what cannot be calibrated."""
    if not requantize:
        raise ValueError("calibration needs requantize=True: a dense weight has no codes to choose")
    if not hasattr(model, "peft_config"):
        return {n: _Original(m.base_weight(), partial(_exact_prepared, m)) for n, m in qlora_layers(model).items()}
    from qlora.integrations.peft import lora_layers
    from qlora.integrations.peft.layers import LoraExperts4bit

    experts = [n for n, m in model.named_modules() if isinstance(m, LoraExperts4bit)]
    if experts:
        raise ValueError(f"{experts[0]} has adapters on experts: calibration cannot merge them into 4 bit")
    return {
        n.removeprefix("base_model.model."): _Original(m.quantized.quantized_weight, partial(_exact_peft, m))
        for n, m in lora_layers(model).items()
    }


def _exact_prepared(layer: QLoRALinear) -> Tensor:
    assert layer.merged_adapter is not None
    return layer.exact_weight(layer.merged_adapter)


def _exact_peft(layer: Any) -> Tensor:
    return layer.exact_weight(layer.merged_adapters)


def _calibrated(
    model: nn.Module,
    reports: dict[str, MergeReport],
    originals: dict[str, _Original],
    windows: Windows,
) -> dict[str, MergeReport]:
    """Calibrates the merged layers; new reports, with the share of the adapter that the outputs keep."""
    exact = {n: originals[n].exact for n in reports}
    base = {n: originals[n].base for n in reports}
    calibration = calibrate_merged(model, windows, exact, base)
    kept = {layer.name: layer.kept for layer in calibration.layers if layer.kept is not None}
    new = {}
    for name, share in kept.items():
        module: Any = model.get_submodule(name)
        weight = module.quantized_weight
        errors = merge_report(
            weight.dequantize(torch.float32), exact[name](), base[name], weight.quant_type, reports[name].adapter
        )
        new[name] = replace(errors, adapter_kept=share)
    return new
