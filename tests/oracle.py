"""The float64 answer of each operator, with the bound that a kernel must keep: ``assert_within(y, *answer)``.

Every function takes a kernel's inputs; ``dense`` is the weight, dequantized in float64. The bounds consist of those in
tolerances.py and include the rounding of the answer to its dtype. Capitals are float64 copies of the inputs.
"""

from typing import NamedTuple

import torch
from tolerances import accumulation, level_rounding, operand_rounding, output_rounding, split_rounding
from torch import Tensor


class Answer(NamedTuple):
    expected: Tensor
    bound: Tensor


def rounded(expected: Tensor, bound: Tensor, dtype: torch.dtype) -> Answer:
    """The answer when a result within ``bound`` is rounded once to ``dtype``."""
    return Answer(expected, bound + output_rounding(expected.abs() + bound, dtype))


def forward(device, x, dense, lora_a=None, lora_b=None, scaling=1.0, bias=None, lora_x=None, levels=True) -> Answer:
    """x Wᵀ + scaling · lora_x Aᵀ Bᵀ + bias; without ``lora_x`` the adapter reads x.

    ``levels``: a forward product, for which a kernel may round levels where a backward product does not.
    """
    X, k = x.double(), x.shape[-1]
    expected, products = X @ dense.T, X.abs() @ dense.abs().T
    bound = accumulation(k, products) + operand_rounding(device, x.dtype, products)
    if levels:
        bound = bound + level_rounding(device, x.dtype, x.numel() // max(1, k), products)
    if bias is not None:
        expected = expected + bias.double()
        bound = bound + accumulation(k, bias.double().abs())
    if lora_a is not None:
        D, A, B = (X if lora_x is None else lora_x.double()), lora_a.double(), lora_b.double()
        expected = expected + scaling * (D @ A.T @ B.T)
        # The inner sum is rounded (k steps), scaled, then summed again with the base (k + r steps).
        products = abs(scaling) * (D.abs() @ A.abs().T @ B.abs().T)
        bound = bound + accumulation(2 * k + len(A) + 4, products) + operand_rounding(device, x.dtype, products)
    if bias is not None or lora_a is not None:
        bound = bound + accumulation(4, expected.abs())
    return rounded(expected, bound, x.dtype)


def forward_multi(device, x, dense, lora_a, lora_b, scaling, adapter_of_row, bias=None, levels=True) -> Answer:
    """One row at a time. Rows without an adapter get one that is scaled by zero."""

    def sums(X, W, A, B, s, bias):
        return X @ W.T + s[:, None] * torch.einsum("mk,mrk,mnr->mn", X, A, B) + bias

    A, B, s = (t.double()[adapter_of_row.clamp(min=0)] for t in (lora_a, lora_b, scaling))
    values = x.double(), dense, A, B, s * (adapter_of_row >= 0), dense.new_zeros(()) if bias is None else bias.double()
    expected, products = sums(*values), sums(*(t.abs() for t in values))
    bound = accumulation(2 * x.shape[1] + 5 * A.shape[1] + 8, products) + operand_rounding(device, x.dtype, products)
    if levels:
        bound = bound + level_rounding(device, x.dtype, len(x), x.double().abs() @ dense.abs().T)
    return rounded(expected, bound, x.dtype)


def forward_experts(
    device, x, dense, expert_of_row, lora_a=None, lora_b=None, scaling=1.0, bias=None, levels=True
) -> Answer:
    """dense [experts, n, k]; each expert with its own rows. Rows without an expert are exactly zero."""
    rows = x.repeat_interleave(len(expert_of_row) // max(1, len(x)), 0)
    expected, bound = (dense.new_zeros(len(rows), dense.shape[1]) for _ in range(2))
    for i, weight in enumerate(dense):
        mine = expert_of_row == i
        a, b, c = (None if t is None else t[i] for t in (lora_a, lora_b, bias))
        expected[mine], bound[mine] = forward(device, rows[mine], weight, a, b, scaling, c, levels=levels)
    return Answer(expected, bound)


def dx_experts(device, grad, dense, expert_of_row, tokens, lora_a=None, lora_b=None, scaling=1.0) -> Answer:
    """The gradients of a token's rows, each rounded to the dtype, are added in float32 and rounded once more."""
    adapter = () if lora_a is None else (lora_b.mT, lora_a.mT, scaling)
    rows, bounds = (
        t.view(tokens, len(expert_of_row) // max(1, tokens), dense.shape[2])
        for t in forward_experts(device, grad, dense.mT, expert_of_row, *adapter, levels=False)
    )
    return rounded(rows.sum(1), bounds.sum(1) + accumulation(rows.shape[1], rows.abs().sum(1)), grad.dtype)


def dx(device, grad, dense, lora_a=None, lora_b=None, scaling=1.0) -> Answer:
    """The forward with every matrix transposed."""
    return forward(device, grad, dense.T, *(() if lora_a is None else (lora_b.T, lora_a.T, scaling)), levels=False)


def dx_many(device, grads, dense, lora_a, lora_b, scaling) -> Answer:
    """The sum over layers: in one accumulator on a CPU, elsewhere rounded to the dtype after each layer."""
    layers = list(zip(grads, dense, lora_a, lora_b, scaling, strict=True))
    if device.startswith("cpu"):  # one product with the layers side by side
        adapted = [(a, s * b.double()) if a is not None else (a, b) for _, _, a, b, s in layers]
        a = [a.double() for a, _ in adapted if a is not None]
        b = [w.new_zeros(len(w), 0) if b is None else b for (_, b), w in zip(adapted, dense, strict=True)]
        adapter = (torch.cat(a), torch.block_diag(*b), 1.0) if a else ()
        return dx(device, torch.cat(grads, -1), torch.cat(dense), *adapter)
    answers = [dx(device, grad, w, *(() if a is None else (a, b, s))) for grad, w, a, b, s in layers]
    expected, bound = answers[0]
    for more, more_bound in answers[1:]:
        expected, bound = rounded(expected + more, bound + more_bound, grads[0].dtype)
    return Answer(expected, bound)


def dx_multi(device, grad, dense, lora_a, lora_b, scaling, adapter_of_row) -> Answer:
    return forward_multi(device, grad, dense.T, lora_b.mT, lora_a.mT, scaling, adapter_of_row, levels=False)


def factor_gradients(device, grad, x, lora_a, lora_b, scaling, largest=None) -> tuple[Answer, Answer]:
    """d_lora_a = Vᵀ x for V = scaling · grad lora_b, and d_lora_b = gradᵀ U for U = scaling · x lora_aᵀ.

    A factor U or V that is scaled into the range of float16 has its largest value at 2^14 or above, so it loses at most
    2^-35 of that value. Pass ``largest``, of V and of U, if other rows of the batch may be larger. Gradients of 16-bit
    factors may be rounded to 16 bit once more, as torch does.
    """
    (m, n), k = grad.shape, x.shape[1]
    G, X, A, B = (t.double() for t in (grad, x, lora_a, lora_b))
    expected = scaling * (G @ B).T @ X, scaling * G.T @ (X @ A.T)
    s, G, X, A, B = (abs(t) for t in (scaling, G, X, A, B))
    V, U = s * G @ B, s * X @ A.T
    largest_v, largest_u = (t * 2.0**-10 for t in largest or [0.0 if t.numel() == 0 else t.max() for t in (V, U)])
    small_a = (s * G.sum(1, keepdim=True) + largest_v).expand_as(V).T @ X
    small_b = G.T @ (s * X.sum(1, keepdim=True) + largest_u).expand_as(U)
    answers = []
    for right, steps, products, small in zip(
        expected, (m + n + 4, m + k + 4), (V.T @ X, G.T @ U), (small_a, small_b), strict=True
    ):
        bound = accumulation(steps, products) + split_rounding(device, x.dtype, products, small)
        if lora_a.dtype == x.dtype:
            bound = bound + operand_rounding(device, x.dtype, products)
        answers.append(rounded(right, bound, lora_a.dtype))
    return tuple(answers)


def bias_gradient(grad: Tensor) -> Answer:
    """The sum over all tokens, in float32."""
    return rounded(grad.double().sum(0), accumulation(len(grad), grad.double().abs().sum(0)), torch.float32)
