"""Corrects counts and averages of other libraries: parameters in packed weights, FLOPs of qlora's operators, and
averages of models, which must not average packed weights.

:mod:`qlora.integrations.registration` calls each function when the module that it changes has been imported.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.nn import Experts4bit
from qlora.nn.packed import PackedMatrix


def hidden_parameters(model: nn.Module) -> int:
    """The number of weights that a count of elements misses, because a packed byte holds two weights."""
    return sum(m.hidden_numel for m in model.modules() if isinstance(m, PackedMatrix | Experts4bit))


# ---- parameters ----


def count_for_peft(module: ModuleType) -> None:
    """Makes ``PeftModel.get_nb_trainable_parameters`` return the numbers of the dense model."""
    count = module.PeftModel.get_nb_trainable_parameters

    @wraps(count)
    def counted(self: Any) -> tuple[int, int]:
        trainable, total = count(self)
        return trainable, total + hidden_parameters(self)

    module.PeftModel.get_nb_trainable_parameters = counted


def count_for_transformers(module: ModuleType) -> None:
    """Makes ``PreTrainedModel.num_parameters`` return the number of the dense model."""
    count = module.ModuleUtilsMixin.num_parameters

    @wraps(count)
    def counted(self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        hidden = 0 if only_trainable else hidden_parameters(self)
        return count(self, only_trainable, exclude_embeddings) + hidden

    module.ModuleUtilsMixin.num_parameters = counted


# ---- operations ----


def _low_rank(m: int, n: int, k: int, lora_a: Any) -> int:
    """FLOPs of the two low-rank products; lora_a is a shape [.., r, k] or None."""
    return 0 if lora_a is None else 2 * m * lora_a[-2] * (n + k)


def _tokens(x: Any) -> int:
    return torch.Size(x[:-1]).numel()


def _layers(x: Any, weights: list, lists: tuple) -> Iterator[tuple[Any, tuple]]:
    """The weight of each layer of forward.many or backward.many, and its arguments from absmax to scaling."""
    _, _, _, out_features, quant_type, block_size, lora_a, lora_b, scaling, *_ = lists
    for weight, n, a, b, s in zip(weights, out_features, lora_a, lora_b, scaling, strict=True):
        yield weight, (None, None, None, (n, x[-1]), quant_type, block_size, a if len(a) == 2 else None, b, s)


def _forward_flops(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    if len(args) < 6:  # the affine form: x, quantized_W [k, n], scale, zero_point, B [k, r], A [r, n], alpha
        k, n = weight
        return 2 * _tokens(x) * (n * k + args[2][1] * (n + k))
    if isinstance(weight, list):  # layers with one input: a list for each argument
        return sum(_forward_flops(x, w, *of_layer) for w, of_layer in _layers(x, weight, args))
    n, k = args[3]
    lora_a = args[6] if len(args) > 6 else kwargs.get("lora_a")
    return 2 * _tokens(x) * n * k + _low_rank(_tokens(x), n, k, lora_a)


def _thin_products(m: int, n: int, k: int, rank: int, needs_x: bool, needs_lora: bool) -> int:
    """FLOPs of a backward's low-rank products.

    dy B for either gradient; (dy B) A for dx; x Aᵀ, dyᵀ (x Aᵀ) and (dy B)ᵀ x for the adapter.
    """
    shared = n if needs_x or needs_lora else 0
    return 2 * m * rank * (shared + k * needs_x + (n + 2 * k) * needs_lora)


def _backward_flops(grad: Any, x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    if isinstance(weight, list):
        used = [len(g) > 1 or g[0] > 0 for g in grad]
        every = zip(used, grad, _layers(x, weight, args), strict=True)
        needs = args[9:11]
        return sum(_backward_flops(g, x, w, *of_layer, None, *needs) for is_used, g, (w, of_layer) in every if is_used)
    m = _tokens(x)
    if len(args) < 8:  # the affine form: scale, zero_point, B, A, alpha, needs_x, needs_lora
        k, n = weight
        return 2 * m * n * k * args[5] + _thin_products(m, n, k, args[2][1], args[5], args[6])
    n, k = args[3]
    lora_a = args[6]
    rank = 0 if lora_a is None else lora_a[-2]
    return 2 * m * n * k * args[10] + _thin_products(m, n, k, rank, args[10], args[11])


def count_operations(module: ModuleType) -> None:
    """Makes torch's FlopCounterMode count qlora's products: 2 · tokens · in · out, and the low-rank ones."""
    module.register_flop_formula(torch.ops.qlora.forward)(_forward_flops)
    module.register_flop_formula(torch.ops.qlora.backward)(_backward_flops)


# ---- averages ----


def average_floats_only(module: ModuleType) -> None:
    """Makes ``AveragedModel`` average only float tensors. Packed weights are frozen and stay as they are, because
    rounded averages of their bytes would be other weights."""
    update: Callable[[Any, nn.Module], None] = module.AveragedModel.update_parameters

    @wraps(update)
    def updated(self: Any, model: nn.Module) -> None:
        if not any(isinstance(m, PackedMatrix | Experts4bit) for m in self.module.modules()):
            update(self, model)
            return

        def floats(tensors: Iterator[Tensor]) -> Iterator[Tensor]:
            return (t for t in tensors if t.is_floating_point())

        def view(of: nn.Module) -> Any:
            buffers = (lambda: floats(of.buffers())) if self.use_buffers else of.buffers
            return SimpleNamespace(parameters=lambda: floats(of.parameters()), buffers=buffers)

        averaged = view(self.module)
        stand_in = SimpleNamespace(
            module=averaged,
            parameters=averaged.parameters,
            use_buffers=self.use_buffers,
            n_averaged=self.n_averaged,
            avg_fn=self.avg_fn,
            multi_avg_fn=self.multi_avg_fn,
        )
        update(stand_in, view(model))

    module.AveragedModel.update_parameters = updated
