"""The operators in torch's frameworks: opcheck, compile, autocast, checkpointing."""

import pytest
import torch
from cases import DTYPES, weights
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import qlora
from qlora import ops


def lora_arguments(m=5, n=24, k=64, dtype=torch.float32):
    weight, _ = weights(n, k)
    x = torch.randn(m, k).to(dtype).requires_grad_()
    return (
        x,
        *weight,
        torch.randn(4, k, requires_grad=True),
        torch.randn(n, 4, requires_grad=True),
        0.5,
        torch.randn(n, requires_grad=True),
        torch.randn(m, k).to(dtype).requires_grad_(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_forward(dtype):
    opcheck(torch.ops.qlora.forward.default, lora_arguments(dtype=dtype))


def test_opcheck_forward_of_the_base_alone():
    weight, _ = weights(24, 64)
    opcheck(torch.ops.qlora.forward.default, (torch.randn(5, 64, requires_grad=True), *weight))


def test_opcheck_backward():
    x, *weight, a, b, scaling, _, lora_x = (t.detach() if isinstance(t, torch.Tensor) else t for t in lora_arguments())
    for needs in ((True,) * 4, (False,) * 4):
        opcheck(torch.ops.qlora.backward.default, (torch.randn(5, 24), x, *weight, a, b, scaling, lora_x, *needs))


@pytest.mark.parametrize("double_quant", [False, True])
def test_opcheck_quantize_and_dequantize(double_quant):
    opcheck(torch.ops.qlora.quantize.default, (torch.randn(5, 77), "nf4", 64, double_quant))
    q = ops.quantize(torch.randn(5, 77), "nf4", 64, double_quant)
    opcheck(torch.ops.qlora.dequantize.default, (*q, [5, 77], "nf4", 64, torch.bfloat16))


def test_opcheck_affine():
    x, b, a = (torch.randn(s, requires_grad=True) for s in ((3, 6), (6, 2), (2, 5)))
    q = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    opcheck(torch.ops.qlora.forward.affine, (x, q, 0.2, -0.5, b, a, 2.0))
    scale, zero = torch.rand(2, 5), torch.randn(2, 5)
    opcheck(torch.ops.qlora.forward.affine_grid, (x, q, scale, zero, b, a, 2.0))
    detached = (x.detach(), q, scale, zero, b.detach(), a.detach(), 2.0)
    opcheck(torch.ops.qlora.backward.affine_grid, (torch.randn(3, 5), *detached, True, True))


def test_compile_fullgraph_equals_eager_forward_and_backward():
    layer = qlora.nn.QLoRALinear(torch.nn.Linear(64, 48), 4)
    with torch.no_grad():
        layer.lora_b["default"].normal_()
    compiled = torch.compile(lambda x: layer(x).relu() * 2, fullgraph=True)
    for m in (1, 30):
        x = torch.randn(m, 64)
        results = []
        for call in (lambda x: layer(x).relu() * 2, compiled):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append((y.detach(), leaf.grad, layer.lora_a["default"].grad, layer.lora_b["default"].grad))
        for eager, graph in zip(*results, strict=True):
            assert torch.allclose(eager, graph, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_activations_only(compiled):
    """float32 scales, adapters and bias are not cast: the result equals that of a bfloat16 x outside autocast."""
    x, *rest, lora_x = lora_arguments()
    call = torch.compile(ops.forward, fullgraph=True) if compiled else ops.forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x, *rest, lora_x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.forward(x.bfloat16(), *rest, lora_x.bfloat16()))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_autocast_of_the_affine_form():
    q = torch.randint(-8, 8, (6, 5), dtype=torch.int8)
    x, b, a = torch.randn(3, 6), torch.randn(6, 2), torch.randn(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.forward_affine(x, q, 0.2, -0.5, b, a, 2.0)
    assert torch.equal(y, ops.forward_affine(x.bfloat16(), q, 0.2, -0.5, b, a, 2.0))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    layer = qlora.nn.QLoRALinear(torch.nn.Linear(64, 64), 4, dropout=0.5)
    x = torch.randn(9, 64, requires_grad=True)
    gradients = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        call(x).square().sum().backward()
        gradients.append((x.grad, layer.lora_b["default"].grad))
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


def test_fake_kernels_take_sizes_beyond_32_bits():
    """With 2^33 weights on the meta device, shapes are computed and nothing is allocated."""
    weight = torch.empty(2**21, 4096, device="meta")
    packed, absmax, nested_absmax, nested_offset = ops.quantize(weight)
    assert (packed.numel(), absmax.numel(), nested_absmax.numel()) == (2**32, 2**27, 2**19)
    y = ops.forward(
        torch.empty(3, 4096, device="meta"), packed, absmax, nested_absmax, nested_offset, (2**21, 4096), "nf4", 64
    )
    assert y.shape == (3, 2**21)
