"""Calibrates one weight: searches its scales, then rounds its columns with error feedback."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora import ops
from qlora.calibration.moments import Moments
from qlora.weight import QuantizedWeight, quantize

RECIPES = ("feedback", "scales")
# Fewer tokens than this many times the in features do not determine the moments: feedback would fit their noise.
TOKENS_PER_FEATURE = 2
_DAMPING, _DAMPING_TOKENS = 0.1, 16384  # of the mean input square, at this many tokens; more for fewer tokens
_MAX_DAMPING = 1e3


@dataclass(frozen=True)
class Calibrated:
    """The result for one weight."""

    weight: QuantizedWeight
    method: str  # "feedback", "scales", or "plain" if neither lowers the error of unseen outputs
    note: str  # why not the recipe's method, or why more damping; empty otherwise
    error: float  # relative error of unseen outputs
    plain_error: float  # the same for quantization without calibration


@dataclass
class Solver:
    """What all weights with the same inputs share: the order of columns and the factors of the feedback."""

    moments: Moments
    order: Tensor
    feedback: Tensor
    correction: Tensor | None  # (k, k): W + W correction is the weight that gives the dense model's outputs
    note: str

    @classmethod
    def of(cls, moments: Moments) -> "Solver":
        """Factorizes the damped second moment in float64. Raises ValueError if that is impossible."""
        diagonal = moments.square.diagonal().double()
        mean = diagonal.mean()
        if not mean.isfinite() or mean <= 0:
            raise ValueError("all inputs are zero, or some are nan or inf")
        # Columns with large inputs come first, because later columns make up for their errors.
        order = diagonal.argsort(descending=True, stable=True)
        damping = (
            _DAMPING * math.sqrt(_DAMPING_TOKENS / moments.tokens) if moments.tokens < _DAMPING_TOKENS else _DAMPING
        )
        note, first = "", damping
        while True:
            damped = moments.square.double()
            damped.diagonal().add_(damping * mean)
            # The Cholesky factor of the reversed matrix, reversed back, is upper triangular: its unit form says how the
            # error of an earlier column is best made up for by a later one.
            lower, failed = torch.linalg.cholesky_ex(damped[order][:, order].flip(0, 1))
            if failed.item() == 0:
                break
            damping *= 10
            if damping > _MAX_DAMPING:
                raise ValueError(f"the second moment of the inputs cannot be factorized, even with damping {damping:g}")
            note = f"damping raised from {first:.2g} to {damping:.2g}: the inputs' second moment is singular"
        upper = lower.flip(0, 1)
        del lower
        feedback = (upper / upper.diagonal()).T.float().contiguous()
        correction = None
        if moments.cross is not None:
            # (C - H) (H + λI)⁻¹, in the order of columns as they are.
            factor = torch.linalg.cholesky(damped)
            difference = (moments.cross - moments.square).double()
            correction = torch.cholesky_solve(difference.T, factor).T.float()
        return cls(moments, order, feedback, correction, note)

    def target(self, weight: Tensor) -> Tensor:
        """The weight whose outputs for the quantized model's inputs are nearest to the dense model's outputs."""
        return weight if self.correction is None else torch.addmm(weight, weight, self.correction)


def with_scales(weight: Tensor, importance: Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Quantizes ``weight``, float32 (n, k), to the nearest levels of searched scales, in the format of ``like``."""
    return _pack(weight, importance, like)


def with_feedback(weight: Tensor, solver: Solver, like: QuantizedWeight) -> QuantizedWeight:
    """Quantizes ``weight``, float32 (n, k), with searched scales and error feedback, in the format of ``like``."""
    return _pack(solver.target(weight), solver.moments.importance, like, solver.feedback, solver.order)


def _pack(
    weight: Tensor,
    importance: Tensor,
    like: QuantizedWeight,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
) -> QuantizedWeight:
    scales = ops.search_scales(weight, importance, like.quant_type, like.block_size, like.double_quant)
    packed = ops.quantize_with_feedback(weight, *scales, like.quant_type, like.block_size, feedback, order)
    return replace(like, packed=packed, absmax=scales[0], nested_absmax=scales[1], nested_offset=scales[2])


def why_not_feedback(moments: Moments, k: int) -> str:
    """Why the inputs do not suffice for error feedback; empty if they do."""
    needed = TOKENS_PER_FEATURE * k
    return "" if moments.tokens >= needed else f"{moments.tokens} tokens: feedback needs {needed} for {k} inputs"


@torch.no_grad()
def calibrate_weight(
    weight: Tensor, moments: Moments, solver: Solver | None, like: QuantizedWeight, note: str = ""
) -> Calibrated:
    """Quantizes ``weight``, float32 (n, k), by the method that gives the least error of unseen outputs.

    ``like`` gives the format. With a solver it tries error feedback, then searched scales, and compares with plain
    quantization. Without unseen tokens it takes the first.
    """
    plain = replace(quantize(weight, like.quant_type, like.block_size, like.double_quant), dtype=like.dtype)
    if moments.tokens == 0:
        error = moments.output_errors(weight, {"plain": plain})["plain"]
        return Calibrated(plain, "plain", note or "no tokens reached it", error, error)
    candidates = {} if solver is None else {"feedback": with_feedback(weight, solver, like)}
    candidates |= {"scales": with_scales(weight, moments.importance, like), "plain": plain}
    errors = moments.output_errors(weight, candidates)
    wanted = next(iter(candidates))
    best = min(errors, key=lambda name: errors[name]) if moments.unseen else wanted
    if solver is not None and solver.note:
        note = solver.note
    if best != wanted:
        note = f"{wanted} had a larger error of unseen outputs: {errors[wanted]:.3g} instead of {errors[best]:.3g}"
    return Calibrated(candidates[best], best, note, errors[best], errors["plain"])
