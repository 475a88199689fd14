"""Operators in plain torch, slow and dense, as the reference for tests and benchmarks of the kernels.

Same signatures as :mod:`qlora.ops`. ``forward`` computes in the dtype of x: with float64 x it is a float64 reference
for the same float32 dequantized weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora import _C
from qlora.tables import scales, table


def _codes(quant_type: str, x: Tensor) -> Tensor:
    if quant_type in _CODES:
        return _CODES[quant_type](x)
    levels = table(_C.codebook(quant_type), x)
    thresholds = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(x, thresholds, right=False)  # number of thresholds strictly below x


def _fp4_codes(x: Tensor) -> Tensor:
    rank = torch.bucketize(x.abs(), table(_C.FP4_THRESHOLDS, x), right=False)
    return torch.tensor(_C.FP4_CODE_OF_RANK, dtype=torch.int64, device=x.device)[rank] + torch.where(x < 0, 8, 0)


def _int4_codes(x: Tensor) -> Tensor:
    return (torch.round(x * 7).clamp(-8, 7) + 8).long()


# Types whose codes are not the number of midpoints below x.
_CODES = {"fp4": _fp4_codes, "int4": _int4_codes}


def _blocks(flat: Tensor, block: int) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _normalised(x: Tensor, scale: Tensor) -> Tensor:
    reciprocal = 1.0 / scale
    return torch.where(scale == 0, 0.0, torch.where(reciprocal.isfinite(), x * reciprocal, x / scale))


def _packed(codes: Tensor) -> Tensor:
    pairs = torch.nn.functional.pad(codes.to(torch.uint8), (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def _stored_scales(absmax: Tensor, double_quant: bool) -> tuple[Tensor, Tensor, Tensor]:
    none = absmax.new_empty(0)
    if not double_quant:
        return absmax, none, none
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    centred = _blocks(absmax - offset, _C.NESTED_BLOCK)
    valid = _blocks(torch.ones_like(absmax), _C.NESTED_BLOCK).bool()
    nested_absmax = torch.where(valid, centred.abs(), 0.0).amax(1)
    x = _normalised(centred, nested_absmax[:, None])
    levels = table(_C.dynamic_map(), x)
    thresholds = (levels[1:] + levels[:-1]) / 2
    scale_codes = torch.bucketize(x, thresholds, right=False).flatten()[: absmax.numel()].to(torch.uint8)
    return scale_codes, nested_absmax, offset.view(1)


def quantize(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    check_finite: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = weight.detach().float().flatten()
    if check_finite and not flat.isfinite().all():
        raise RuntimeError("weight is nan or inf")
    blocks = _blocks(flat, block_size)
    absmax = blocks.abs().amax(1)
    codes = _codes(quant_type, _normalised(blocks, absmax[:, None])).flatten()[: flat.numel()]
    packed = _packed(codes)
    return packed, *_stored_scales(absmax, double_quant)


def search_scales(
    weight: Tensor,
    importance: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    if not weight.isfinite().all():
        raise RuntimeError("weight is nan or inf")
    blocks = _blocks(weight.flatten(), block_size)
    weights = _blocks(importance.expand_as(weight).flatten(), block_size)
    absmax = blocks.abs().amax(1)
    scales_tried = table(list(_C.SCALE_FACTORS), weight) * absmax[:, None]
    levels = table(_C.codebook(quant_type), weight)
    loss = torch.zeros_like(scales_tried)
    for x, w in zip(blocks.T, weights.T, strict=True):  # element by element: the order of the kernels' sums
        error = x[:, None] - levels[_codes(quant_type, _normalised(x[:, None], scales_tried))] * scales_tried
        loss = loss + w[:, None] * (error * error)
    best = scales_tried.gather(1, loss.nan_to_num(torch.inf).argmin(1, keepdim=True)).flatten()
    usable = (1.0 / scales_tried).isfinite().all(1)  # not for zero and subnormal scales
    return _stored_scales(torch.where(usable, best, absmax), double_quant)


def quantize_with_feedback(
    weight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    feedback: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    n, k = weight.shape
    levels = table(_C.codebook(quant_type), weight)
    scale = scales(absmax.flatten(), nested_absmax, nested_offset).repeat_interleave(block_size)[: n * k].view(n, k)
    columns = torch.arange(k, device=weight.device) if order is None else order
    target = weight[:, columns].clone()
    codes = torch.zeros(n, k, dtype=torch.int64, device=weight.device)
    for step, column in enumerate(columns.tolist()):
        codes[:, column] = _codes(quant_type, _normalised(target[:, step], scale[:, column]))
        if feedback is not None:
            error = weight[:, column] - levels[codes[:, column]] * scale[:, column]
            target[:, step + 1 :] += error[:, None] * feedback[step + 1 :, step]
    return _packed(codes.flatten())


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    flat = packed.flatten()
    numel = torch.Size(shape).numel()
    codes = torch.stack((flat >> 4, flat & 0xF), dim=1).flatten()[:numel]
    levels = table(_C.codebook(quant_type), packed)[codes.long()]
    scale = scales(absmax.flatten(), nested_absmax, nested_offset).repeat_interleave(block_size)[:numel]
    return (levels * scale).to(dtype).view(*shape)


def quantization_error(
    weight: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Tensor:
    dense = dequantize(
        packed, absmax, nested_absmax, nested_offset, weight.shape, quant_type, block_size, torch.float32
    )
    exact = weight.double()
    difference = (dense - exact).abs()
    largest = difference.max() if difference.numel() else torch.zeros((), dtype=torch.float64, device=difference.device)
    return torch.stack((difference.square().sum(), exact.square().sum(), largest))


def forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    lora_x: Tensor | None = None,
) -> Tensor:
    weight = dequantize(packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size, torch.float32)
    y = x @ weight.to(x.dtype).T
    if bias is not None:
        y = y + bias.to(x.dtype)
    if lora_a is not None and lora_b is not None:
        down = (x if lora_x is None else lora_x) @ lora_a.to(x.dtype).T
        y = y + scaling * (down @ lora_b.to(x.dtype).T)
    return y


def forward_multi(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    adapter_of_row: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    weight = (packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size)
    rows = x.reshape(-1, x.shape[-1])
    outputs = [forward(rows, *weight, bias=bias)]  # adapter -1, the base alone, is at index 0
    for a, b, s in zip(lora_a, lora_b, scaling.tolist(), strict=True):
        outputs.append(forward(rows, *weight, a, b, s, bias))
    y = torch.stack(outputs)[adapter_of_row + 1, torch.arange(len(rows), device=x.device)]
    return y.view(*x.shape[:-1], shape[0])


def forward_many(
    x: Tensor,
    packed: Sequence[Tensor],
    absmax: Sequence[Tensor],
    nested_absmax: Sequence[Tensor | None],
    nested_offset: Sequence[Tensor | None],
    out_features: Sequence[int],
    quant_type: str,
    block_size: int,
    lora_a: Sequence[Tensor | None] | None = None,
    lora_b: Sequence[Tensor | None] | None = None,
    scaling: Sequence[float] | None = None,
    bias: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    results = []
    for i, n in enumerate(out_features):
        weight = (packed[i], absmax[i], nested_absmax[i], nested_offset[i], (n, x.shape[-1]), quant_type, block_size)
        a, b, c = (None if given is None else given[i] for given in (lora_a, lora_b, bias))
        results.append(forward(x, *weight, a, b, 1.0 if scaling is None else scaling[i], c))
    return results


def forward_experts(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    quant_type: str,
    block_size: int,
    expert_of_row: Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    experts, n, k = shape
    tokens, expert_of_row = x.reshape(-1, k), expert_of_row.flatten()
    rows = tokens.repeat_interleave(len(expert_of_row) // max(1, len(tokens)), 0)
    y = rows.new_zeros(len(rows), n)
    statistics = [None if t is None or t.numel() == 0 else t.view(experts, -1) for t in (nested_absmax, nested_offset)]
    for i in range(experts):
        mine = (expert_of_row == i).nonzero()[:, 0]
        nested = [t if t is None else t[i] for t in statistics]
        weight = (packed.view(experts, -1)[i], absmax.view(experts, -1)[i], nested[0], nested[1], (n, k))
        a, b, c = (t if t is None else t[i] for t in (lora_a, lora_b, bias))
        part = forward(rows[mine], *weight, quant_type, block_size, a, b, scaling, c)
        y = y.index_copy(0, mine, part)
    return y


def forward_affine(
    x: Tensor,
    quantized_W: Tensor,
    scale: float | Tensor,
    zero_point: float | Tensor,
    B: Tensor,
    A: Tensor,
    alpha: float,
) -> Tensor:
    q = quantized_W.to(x.dtype)
    if isinstance(scale, Tensor) and scale.dim() == 2:
        scale = scale.repeat_interleave(q.shape[0] // scale.shape[0], dim=0)
    if isinstance(zero_point, Tensor) and zero_point.dim() == 2:
        zero_point = zero_point.repeat_interleave(q.shape[0] // zero_point.shape[0], dim=0)
    weight = q * scale + zero_point
    return x @ weight + alpha / B.shape[1] * (x @ B.to(x.dtype) @ A.to(x.dtype))


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
    """Computes in the dtype of the moments: float64 moments give a float64 step."""

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=exp_avg.dtype, device=exp_avg.device)

    g, p = grad.to(exp_avg.dtype), param.detach().to(exp_avg.dtype)
    exp_avg += number(1 - beta1) * (g - exp_avg)
    exp_avg_sq.copy_(number(beta2) * exp_avg_sq + number(1 - beta2) * g * g)
    root = exp_avg_sq.double().sqrt().to(exp_avg_sq.dtype)  # torch's float32 root may be wrong in the last bit
    denominator = root / number((1 - beta2**step) ** 0.5) + number(eps)
    p = p * number(1 - lr * weight_decay) - number(lr / (1 - beta1**step)) * (exp_avg / denominator)
    with torch.no_grad():
        param.copy_(p)


def _moments(codes: Tensor, absmax: Tensor, values: list[float]) -> Tensor:
    return table(values, absmax)[codes.long()] * absmax.repeat_interleave(_C.MOMENT_BLOCK)[: codes.numel()]


def _store_moments(moments: Tensor, codes: Tensor, absmax: Tensor, values: list[float]) -> None:
    levels = table(values, absmax)
    pad = -moments.numel() % _C.MOMENT_BLOCK
    blocks = torch.nn.functional.pad(moments, (0, pad)).view(-1, _C.MOMENT_BLOCK)
    absmax.copy_(blocks.abs().amax(1))
    reciprocal = 1 / absmax
    scaled = torch.where(reciprocal.isfinite()[:, None], blocks * reciprocal[:, None], blocks / absmax[:, None])
    nearest = torch.bucketize(scaled.nan_to_num(), (levels[1:] + levels[:-1]) / 2)
    codes.copy_(nearest.flatten()[: codes.numel()].to(torch.uint8))


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
    signed, unsigned = _C.dynamic_map(), _C.unsigned_dynamic_map()
    first = _moments(exp_avg.flatten(), exp_avg_absmax, signed)
    second = _moments(exp_avg_sq.flatten(), exp_avg_sq_absmax, unsigned)
    flat = param.detach().flatten()
    adamw(flat, grad.flatten(), first, second, lr, beta1, beta2, eps, weight_decay, step)
    with torch.no_grad():
        param.copy_(flat.view_as(param))
    _store_moments(first, exp_avg.view(-1), exp_avg_absmax, signed)
    _store_moments(second, exp_avg_sq.view(-1), exp_avg_sq_absmax, unsigned)
    exp_avg_sq.view(-1)[(exp_avg_sq.view(-1) == 0) & (second > 0)] = 1
