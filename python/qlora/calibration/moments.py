"""Moments: sums over tokens of products of a layer's inputs, from which its weights are calibrated."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora.weight import QuantizedWeight


@dataclass
class Moments:
    """What calibration knows about the inputs of one layer with k in features.

    ``inputs`` of the quantized model are what the layer will get; ``exact`` inputs are those of the dense model.
    """

    square: Tensor  # float32 (k, k): sum over tokens of inputs inputsᵀ; or only its diagonal [k]
    cross: Tensor | None  # float32 (k, k): sum over tokens of exact inputsᵀ; None: not needed
    tokens: int = 0
    unseen: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (inputs, exact), for the report of the error

    @classmethod
    def zeros(cls, k: int, device: torch.device, recipe: str, with_cross: bool = True) -> "Moments":
        """Moments of no tokens, with what ``recipe`` needs: "scales" only the diagonal."""
        if recipe == "scales":
            return cls(torch.zeros(k, device=device), None)
        square = torch.zeros(k, k, device=device)
        return cls(square, torch.zeros_like(square) if with_cross else None)

    def add(self, inputs: Tensor, exact: Tensor, is_unseen: bool) -> None:
        """Adds the tokens of one batch, (tokens, k) each; those that are ``is_unseen`` only judge the result."""
        inputs, exact = inputs.float(), exact.float()
        if len(inputs) == 0:
            return
        if is_unseen:
            self.unseen.append((inputs, exact))
            return
        self.tokens += len(inputs)
        if self.square.dim() == 1:
            self.square += inputs.square().sum(0)
            return
        self.square.addmm_(inputs.T, inputs)
        if self.cross is not None:
            self.cross.addmm_(exact.T, inputs)

    @property
    def importance(self) -> Tensor:
        """The mean square of each input, float32 [k]."""
        return self.diagonal / max(1, self.tokens)

    @property
    def diagonal(self) -> Tensor:
        return self.square if self.square.dim() == 1 else self.square.diagonal()

    def output_errors(self, exact_weight: Tensor, weights: dict[str, QuantizedWeight]) -> dict[str, float]:
        """The relative error of the unseen tokens' outputs, ‖inputs weightᵀ − exact exact_weightᵀ‖ / ‖…‖, by name.

        nan if there are no unseen tokens.
        """
        outputs = [exact @ exact_weight.T for _, exact in self.unseen]
        size = _squares(outputs)
        errors = {}
        for name, weight in weights.items():
            dense = weight.dequantize(torch.float32)
            wrong = _squares([(inputs @ dense.T).sub_(y) for (inputs, _), y in zip(self.unseen, outputs, strict=True)])
            errors[name] = math.sqrt(wrong / size) if size > 0 else (0.0 if self.unseen else math.nan)
        return errors

    def kept(self, base: QuantizedWeight, exact: Tensor, merged: QuantizedWeight) -> float:
        """The share of the outputs' change from ``base`` to ``exact`` that ``merged`` keeps, for unseen tokens."""
        before, after = base.dequantize(torch.float32), merged.dequantize(torch.float32)
        along = squares = torch.zeros((), dtype=torch.float64)
        for inputs, _ in self.unseen:
            change = inputs @ (exact - before).T
            along = along + ((inputs @ (after - before).T) * change).sum(dtype=torch.float64).cpu()
            squares = squares + change.square().sum(dtype=torch.float64).cpu()
        if not self.unseen:
            return math.nan
        return (along / squares).item() if squares != 0 else 1.0


def _squares(tensors: list[Tensor]) -> float:
    return sum(torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2 for tensor in tensors)
