"""Calibrates the experts of a mixture-of-experts layer, each for the tokens that the router sends to it."""

from typing import Any

import torch
from torch import Tensor, nn

from qlora.calibration.moments import Moments
from qlora.calibration.report import LayerReport
from qlora.calibration.weights import calibrate_for
from qlora.nn import Experts4bit

# Of one batch: hidden states and chosen experts in the quantized model, hidden states in the dense one, is unseen.
Routed = tuple[Tensor, Tensor, Tensor, bool]


def calibrate_experts(
    name: str, layer: Experts4bit, dense: nn.Module, batches: list[Routed], recipe: str
) -> list[LayerReport]:
    """Calibrates every weight of ``layer`` in place; ``dense`` is the same module with dense float32 weights.

    An expert that gets few tokens has only its scales searched.
    """
    first = "gate_up_proj" if layer.has_gate else "up_proj"
    reports = []
    for index in range(layer.num_experts):
        routed = [_tokens_of(index, *batch) for batch in batches]
        reports.append(_calibrate(name, layer, dense, first, index, routed, recipe))
        activated = [
            (
                _activate(layer, layer.project(first, inputs, torch.full_like(inputs[:, 0], index, dtype=torch.int64))),
                _activate(layer, _project(dense, first, index, exact)),
                is_unseen,
            )
            for inputs, exact, is_unseen in routed
        ]
        reports.append(_calibrate(name, layer, dense, "down_proj", index, activated, recipe))
    return reports


def _tokens_of(
    index: int, hidden: Tensor, chosen: Tensor, exact: Tensor, is_unseen: bool
) -> tuple[Tensor, Tensor, bool]:
    rows = (chosen == index).any(-1).flatten()
    return hidden.flatten(0, -2)[rows], exact.flatten(0, -2)[rows], is_unseen


def _dense_weight(dense: Any, name: str, index: int) -> Tensor:
    weight = getattr(dense, name)[index]
    return weight.T.contiguous() if dense.is_transposed else weight


def _project(dense: Any, name: str, index: int, x: Tensor) -> Tensor:
    bias = getattr(dense, f"{name}_bias")[index] if dense.has_bias else None
    return nn.functional.linear(x, _dense_weight(dense, name, index), bias)


def _activate(layer: Any, hidden: Tensor) -> Tensor:
    return layer.experts_class._apply_gate(layer, hidden) if layer.has_gate else layer.act_fn(hidden)


def _calibrate(
    name: str,
    layer: Experts4bit,
    dense: nn.Module,
    projection: str,
    index: int,
    batches: list[tuple[Tensor, Tensor, bool]],
    recipe: str,
) -> LayerReport:
    weight = _dense_weight(dense, projection, index).float()
    name = f"{name}.{projection}.{index}"
    moments = Moments.zeros(weight.shape[1], weight.device, recipe)
    for inputs, exact, is_unseen in batches:
        moments.add(inputs, exact, is_unseen)
    try:
        result = calibrate_for(weight, moments, layer.expert(projection, index), recipe)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    layer.set_expert(projection, index, result.weight)
    return LayerReport(name, result.method, result.error, result.plain_error, result.note)
