"""Calibrates one weight: searches its scales, then rounds its columns with error feedback."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora.calibration.moments import Moments
from qlora.weight import QuantizedWeight, quantize, quantize_to_searched_scales

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
        diagonal = moments.diagonal.double()
        mean = diagonal.mean()
        if not mean.isfinite() or mean <= 0:
            raise ValueError("all inputs are zero, or some are nan or inf")
        # Columns with large inputs come first, because later columns make up for their errors.
        order = diagonal.argsort(descending=True, stable=True)
        backwards = order.flip(0)
        first = damping = _DAMPING * max(1.0, math.sqrt(_DAMPING_TOKENS / moments.tokens))
        while True:
            damped = moments.square[backwards][:, backwards].double()
            damped.diagonal().add_(damping * mean)
            lower, failed = torch.linalg.cholesky_ex(damped)
            del damped
            if failed.item() == 0:
                break
            damping *= 10
            if damping > _MAX_DAMPING:
                raise ValueError(f"the second moment of the inputs cannot be factorized, even with damping {damping:g}")
        raised = f"damping raised from {first:.2g} to {damping:.2g}: the inputs' second moment is singular"
        correction = None
        if moments.cross is not None:  # (C - H) (H + λI)⁻¹, by the factor of the matrix in backward order
            difference = (moments.cross - moments.square)[:, backwards].double()
            correction = torch.empty_like(moments.square)
            correction[:, backwards] = torch.cholesky_solve(difference.T, lower).T.float()
            del difference
        # The factor of the matrix in backward order, reversed, is upper triangular in the order of steps. Its unit form
        # says how a later column best makes up for the error of an earlier one.
        upper = lower.float().flip(0, 1)
        del lower
        feedback = upper.div_(upper.diagonal().clone()).T.contiguous()
        return cls(moments, order, feedback, correction, raised if damping > first else "")

    def target(self, weight: Tensor) -> Tensor:
        """The weight whose outputs for the quantized model's inputs are nearest to the dense model's outputs."""
        return weight if self.correction is None else torch.addmm(weight, weight, self.correction)


def with_scales(weight: Tensor, importance: Tensor, like: QuantizedWeight) -> QuantizedWeight:
    """Quantizes ``weight``, float32 (n, k), to the nearest levels of searched scales, in the format of ``like``."""
    return quantize_to_searched_scales(weight, importance, like)


def with_feedback(weight: Tensor, solver: Solver, like: QuantizedWeight) -> QuantizedWeight:
    """Quantizes ``weight``, float32 (n, k), with searched scales and error feedback, in the format of ``like``."""
    return quantize_to_searched_scales(
        solver.target(weight), solver.moments.importance, like, solver.feedback, solver.order
    )


def solver_for(moments: Moments, recipe: str) -> tuple[Solver | None, str]:
    """What error feedback with these inputs needs, or None and the reason why there is none."""
    if recipe != "feedback" or moments.tokens == 0:
        return None, ""
    k = len(moments.diagonal)
    needed = TOKENS_PER_FEATURE * k
    if moments.tokens < needed:
        return None, f"{moments.tokens} tokens: feedback needs {needed} for {k} inputs"
    if moments.diagonal.sum() == 0:
        return None, "all inputs are zero"
    return Solver.of(moments), ""


def calibrate_for(weight: Tensor, moments: Moments, like: QuantizedWeight, recipe: str) -> Calibrated:
    """Quantizes one weight whose inputs no other weight has."""
    solver, note = solver_for(moments, recipe)
    return calibrate_weight(weight, moments, solver, like, note)


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
    notes = [note] if note else []
    if solver is not None and solver.note:
        notes.append(solver.note)
    if best != wanted:
        worse = f"{errors[wanted]:.3g} instead of {errors[best]:.3g}"
        notes.append(f"{wanted} had a larger error of unseen outputs: {worse}")
    note = "; ".join(notes)
    return Calibrated(candidates[best], best, note, errors[best], errors["plain"])
