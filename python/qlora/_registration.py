"""What torch needs to know of the operators besides their kernels: fake kernels, autograd, autocast.

Importing this module registers it all, once; :mod:`qlora.ops` does.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qlora import _C, _load  # noqa: F401  (_load loads the operators)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# ---- fake kernels: shapes and dtypes only ----------------------------------------------------------------------------


@torch.library.register_fake("qlora::quantize")
def _(weight, quant_type="nf4", block_size=64, double_quant=True, check_finite=True):
    numel = weight.numel()
    blocks = (numel + block_size - 1) // block_size
    nested = (blocks + _C.NESTED_BLOCK - 1) // _C.NESTED_BLOCK if double_quant else 0
    return (
        weight.new_empty((numel + 1) // 2, dtype=torch.uint8),
        weight.new_empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        weight.new_empty(nested, dtype=torch.float32),
        weight.new_empty(1 if double_quant else 0, dtype=torch.float32),
    )


@torch.library.register_fake("qlora::dequantize")
def _(packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("qlora::quantization_error")
def _(weight, packed, absmax, nested_absmax, nested_offset, quant_type, block_size):
    return weight.new_empty(3, dtype=torch.float64)


@torch.library.register_fake("qlora::forward.multi")
@torch.library.register_fake("qlora::forward")
def _(x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size, *unused_lora, **unused):
    torch._check(x.shape[-1] == shape[1], lambda: f"x has {x.shape[-1]} features: in_features={shape[1]}")
    torch._check(
        x.device == packed.device == absmax.device,
        lambda: f"x is on {x.device}, packed on {packed.device}, absmax on {absmax.device}: they must be on one device",
    )
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("qlora::backward")
def _(
    grad,
    x,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    shape,
    quant_type,
    block_size,
    lora_a,
    lora_b,
    scaling,
    lora_x,
    needs_x,
    needs_lora,
    needs_lora_x,
    needs_bias,
):
    def nothing():
        return x.new_empty(0, dtype=torch.float32)

    has_lora = lora_a is not None
    return (
        x.new_empty(x.shape) if needs_x else nothing(),
        lora_a.new_empty(lora_a.shape) if needs_lora and has_lora else nothing(),
        lora_b.new_empty(lora_b.shape) if needs_lora and has_lora else nothing(),
        x.new_empty(x.shape) if needs_lora_x and lora_x is not None else nothing(),
        x.new_empty(shape[0], dtype=torch.float32) if needs_bias else nothing(),
    )


@torch.library.register_fake("qlora::backward.multi")
def _(
    grad,
    x,
    packed,
    absmax,
    nested_absmax,
    nested_offset,
    shape,
    quant_type,
    block_size,
    lora_a,
    lora_b,
    scaling,
    adapter_of_row,
    needs_x,
    needs_lora,
    needs_bias,
):
    def nothing():
        return x.new_empty(0, dtype=torch.float32)

    return (
        x.new_empty(x.shape) if needs_x else nothing(),
        lora_a.new_empty(lora_a.shape) if needs_lora else nothing(),
        lora_b.new_empty(lora_b.shape) if needs_lora else nothing(),
        x.new_empty(shape[0], dtype=torch.float32) if needs_bias else nothing(),
    )


@torch.library.register_fake("qlora::forward.affine")
@torch.library.register_fake("qlora::forward.affine_grid")
def _(x, quantized_W, scale, zero_point, B, A, alpha):
    return x.new_empty((*x.shape[:-1], quantized_W.shape[1]))


@torch.library.register_fake("qlora::backward.affine_grid")
def _(grad, x, quantized_W, scale, zero_point, B, A, alpha, needs_x, needs_lora):
    def nothing():
        return x.new_empty(0, dtype=torch.float32)

    return (
        x.new_empty(x.shape) if needs_x else nothing(),
        B.new_empty(B.shape) if needs_lora else nothing(),
        A.new_empty(A.shape) if needs_lora else nothing(),
    )


@torch.library.register_fake("qlora::adamw")
@torch.library.register_fake("qlora::adamw_8bit")
@torch.library.register_fake("qlora::adamw.many")
@torch.library.register_fake("qlora::adamw_8bit.many")
def _(param, *state_and_hyperparameters):
    return None


# ---- autograd --------------------------------------------------------------------------------------------------------


def _require_frozen(*statistics: Tensor | None) -> None:
    if any(t is not None and t.requires_grad for t in statistics):
        raise RuntimeError("absmax or its nested statistics require grad: a 4-bit weight is frozen, detach them")


def _setup_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    (x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size) = inputs[:8]
    lora_a, lora_b, scaling, bias, lora_x = inputs[8:]
    _require_frozen(absmax, nested_absmax, nested_offset)
    ctx.save_for_backward(x, packed, absmax, nested_absmax, nested_offset, lora_a, lora_b, lora_x)
    ctx.weight = (list(shape), quant_type, block_size)
    ctx.scaling = scaling
    ctx.bias_dtype = None if bias is None else bias.dtype


_BACKWARD = torch.ops.qlora.backward.default


def _call_backward(grad: Tensor, *inputs: Any) -> Any:
    """The operator without the dispatcher's autograd key, where nothing needs it. Not around ``ctx.saved_tensors``, in
    which a checkpoint computes its forward once more."""
    if (
        torch.is_grad_enabled()  # create_graph: the registration refuses it
        or torch.compiler.is_compiling()
        or type(grad) is not Tensor
        or torch._C._are_functorch_transforms_active()
    ):
        return _BACKWARD(grad, *inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _BACKWARD(grad, *inputs)


def _backward_forward(ctx: Any, grad: Tensor):
    x, packed, absmax, nested_absmax, nested_offset, lora_a, lora_b, lora_x = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, *(False,) * 5)  # the dispatcher leaves out trailing arguments at their defaults
    needs_x, needs_a, needs_b, needs_bias, needs_lora_x = needs[0], needs[8], needs[9], needs[11], needs[12]
    d_x, d_a, d_b, d_lora_x, d_bias = _call_backward(
        grad,
        x,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        *ctx.weight,
        lora_a,
        lora_b,
        ctx.scaling,
        lora_x,
        needs_x,
        needs_a or needs_b,
        needs_lora_x,
        needs_bias,
    )
    return (
        d_x if needs_x else None,
        *(None,) * 7,
        d_a if needs_a else None,
        d_b if needs_b else None,
        None,
        d_bias.to(ctx.bias_dtype) if needs_bias else None,
        d_lora_x if needs_lora_x else None,
    )


def _setup_multi(ctx: Any, inputs: tuple, output: Tensor) -> None:
    (x, packed, absmax, nested_absmax, nested_offset, shape, quant_type, block_size) = inputs[:8]
    lora_a, lora_b, scaling, adapter_of_row, bias = inputs[8:]
    _require_frozen(absmax, nested_absmax, nested_offset)
    if scaling.requires_grad:
        raise RuntimeError("scaling requires grad: forward.multi has no gradient for it, detach it")
    ctx.save_for_backward(x, packed, absmax, nested_absmax, nested_offset, lora_a, lora_b, scaling, adapter_of_row)
    ctx.weight = (list(shape), quant_type, block_size)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward_multi(ctx: Any, grad: Tensor):
    x, packed, absmax, nested_absmax, nested_offset, *adapters = ctx.saved_tensors
    needs = (*ctx.needs_input_grad, False)  # the dispatcher leaves out a trailing bias=None
    needs_x, needs_a, needs_b, needs_bias = needs[0], needs[8], needs[9], needs[12]
    weight = (packed, absmax, nested_absmax, nested_offset, *ctx.weight)
    d_x, d_a, d_b, d_bias = torch.ops.qlora.backward.multi(
        grad, x, *weight, *adapters, needs_x, needs_a or needs_b, needs_bias
    )
    return (
        d_x if needs_x else None,
        *(None,) * 7,
        d_a if needs_a else None,
        d_b if needs_b else None,
        None,
        None,
        d_bias.to(ctx.bias_dtype) if needs_bias else None,
    )


def _setup_affine(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, quantized_W, scale, zero_point, B, A, alpha = inputs
    if isinstance(scale, Tensor) and (scale.requires_grad or zero_point.requires_grad):
        raise RuntimeError("scale and zero_point require grad: forward.affine has no gradient for them, detach them")
    ctx.alpha = alpha
    if isinstance(scale, Tensor):
        ctx.save_for_backward(x, quantized_W, B, A, scale, zero_point)
    else:
        ctx.save_for_backward(x, quantized_W, B, A)
        ctx.scalars = (scale, zero_point)


def _backward_affine(ctx: Any, grad: Tensor):
    x, quantized_W, B, A, *grid = ctx.saved_tensors
    if not grid:
        grid = [x.new_full((1,), value, dtype=torch.float32) for value in ctx.scalars]
    needs_x, needs_lora = ctx.needs_input_grad[0], ctx.needs_input_grad[4] or ctx.needs_input_grad[5]
    d_x, d_B, d_A = torch.ops.qlora.backward.affine_grid(
        grad, x, quantized_W, *grid, B, A, ctx.alpha, needs_x, needs_lora
    )
    return (
        d_x if needs_x else None,
        *(None,) * 3,
        d_B if ctx.needs_input_grad[4] else None,
        d_A if ctx.needs_input_grad[5] else None,
        None,
    )


def _no_double_backward(ctx: Any, *grads: Tensor):
    raise RuntimeError("qlora's backward is not differentiable: double backward (create_graph=True) is not supported")


def _no_gradient_for_the_weight(ctx: Any, *grads: Tensor):
    raise RuntimeError("quantize and dequantize are not differentiable: a 4-bit weight is frozen")


torch.library.register_autograd("qlora::forward", _backward_forward, setup_context=_setup_forward)
torch.library.register_autograd("qlora::forward.multi", _backward_multi, setup_context=_setup_multi)
torch.library.register_autograd("qlora::backward.multi", _no_double_backward)
torch.library.register_autograd("qlora::forward.affine", _backward_affine, setup_context=_setup_affine)
torch.library.register_autograd("qlora::forward.affine_grid", _backward_affine, setup_context=_setup_affine)
torch.library.register_autograd("qlora::backward", _no_double_backward)
torch.library.register_autograd("qlora::backward.affine_grid", _no_double_backward)
torch.library.register_autograd("qlora::quantize", _no_gradient_for_the_weight)
torch.library.register_autograd("qlora::dequantize", _no_gradient_for_the_weight)


# The way of ``qlora.ops.forward`` and the layers around what the registrations above cost: Python for each key of the
# dispatcher, 13 µs a call without gradients and 60 with them. Compilers, autocast, functorch and subclasses of Tensor
# take the dispatcher's way. docs/performance.md has the figures.

_FORWARD = torch.ops.qlora.forward.default
_PLAIN = (Tensor, torch.nn.Parameter)
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _FORWARD(*inputs)
        _setup_forward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward_forward(ctx, *grads)


def refuse_forward_mode(*inputs: Any) -> None:
    """Raises NotImplementedError if an input carries a tangent: torch would drop it without a word."""
    if forward_ad._current_level < 0:
        return
    if any(isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs):
        raise NotImplementedError("qlora has no forward-mode derivatives (jvp, forward AD): use reverse mode")


def forward(*inputs: Any) -> Tensor:
    """All 13 arguments of ``torch.ops.qlora.forward``, by position; the same result."""
    x = inputs[0]
    refuse_forward_mode(*inputs)
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or not (x.is_cpu or x.is_cuda)
    ):
        return _FORWARD(*inputs)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _Forward.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return _FORWARD(*inputs)


# ---- autocast --------------------------------------------------------------------------------------------------------
# torch's ready-made rule casts every float tensor, the float32 scales as well. Ours casts the activations only:
# adapters and bias may have a dtype of their own.

_AUTOCAST_LIBRARY = torch.library.Library("qlora", "FRAGMENT")


def _cast_activation(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return x.to(dtype) if x is not None and x.dtype in FLOAT_DTYPES else x


def _register_autocast(device: str) -> None:
    key = _AUTOCAST_KEYS[device]
    below_autocast = torch._C.DispatchKeySet(key)

    def forward_autocast(x, *args, lora_x=None, **kwargs):
        dtype = torch.get_autocast_dtype(device)
        if len(args) == 12:  # lora_x came by position
            args, lora_x = args[:-1], args[-1]
        with torch._C._ExcludeDispatchKeyGuard(below_autocast):
            return torch.ops.qlora.forward(
                _cast_activation(x, dtype), *args, **kwargs, lora_x=_cast_activation(lora_x, dtype)
            )

    def x_only(op):
        def run(x, *args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(below_autocast):
                return op(_cast_activation(x, torch.get_autocast_dtype(device)), *args, **kwargs)

        return run

    name = f"Autocast{device.upper()}"
    _AUTOCAST_LIBRARY.impl("forward", forward_autocast, name)
    _AUTOCAST_LIBRARY.impl("forward.multi", x_only(torch.ops.qlora.forward.multi), name)
    _AUTOCAST_LIBRARY.impl("forward.affine", x_only(torch.ops.qlora.forward.affine), name)
    _AUTOCAST_LIBRARY.impl("forward.affine_grid", x_only(torch.ops.qlora.forward.affine_grid), name)


for _device in _AUTOCAST_KEYS:
    _register_autocast(_device)
