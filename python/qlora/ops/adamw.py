"""``adamw`` and ``adamw_8bit``: one step of the optimizer in one pass, in place."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora import _load  # noqa: F401  (loads the operators)


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One step of AdamW in place, in one pass. ``param`` has any float dtype, the moments are float32.

    All tensors have the same shape; param and the moments are contiguous. step counts from 1. Every operation is
    rounded separately in float32, so the result is bitwise the same on every device.
    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2.
    """
    with torch.no_grad():
        torch.ops.qlora.adamw.default(param, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step)
    torch.autograd.graph.increment_version((param, exp_avg, exp_avg_sq))


def adamw_8bit(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_absmax: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_absmax: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """:func:`adamw` with 8-bit moments in blocks of 256 along the flat order.

    exp_avg holds uint8 codes of the signed dynamic map, exp_avg_sq of the unsigned one; each has a float32 absmax per
    block, ``[ceil(numel / 256)]``. A fresh state has codes and absmax of zero. A nonzero second moment never rounds to
    zero, because the next step would then divide by eps.
    Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".
    """
    state = (exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax)
    with torch.no_grad():
        torch.ops.qlora.adamw_8bit.default(param, grad, *state, lr, beta1, beta2, eps, weight_decay, step)
    torch.autograd.graph.increment_version((param, *state))


def adamw_many(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    steps: Sequence[int],
) -> None:
    """:func:`adamw` or :func:`adamw_8bit` for many parameters on one device, with bitwise the same results.

    A GPU needs one launch per sixteen parameters. ``states`` has each parameter's moments in the order of those
    functions: two tensors for every parameter, or four for every parameter.
    """
    if not params:
        return
    columns = [list(column) for column in zip(*states, strict=True)]
    op = torch.ops.qlora.adamw.many if len(columns) == 2 else torch.ops.qlora.adamw_8bit.many
    with torch.no_grad():
        op(list(params), list(grads), *columns, lr, beta1, beta2, eps, weight_decay, list(steps))
    torch.autograd.graph.increment_version([*params, *(tensor for column in columns for tensor in column)])


@torch.library.register_fake("qlora::adamw")
@torch.library.register_fake("qlora::adamw_8bit")
@torch.library.register_fake("qlora::adamw.many")
@torch.library.register_fake("qlora::adamw_8bit.many")
def _(param: Tensor, *state_and_hyperparameters: Any) -> None:
    return None
