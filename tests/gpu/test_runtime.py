"""Tests that need a GPU: graphs, streams, synchronization, memory, and tensors beyond 2^31 elements."""

import subprocess
import sys

import pytest
import torch

import qlora
from qlora import _load, ops

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and _load.has_cuda_ops()), reason="no GPU, or qlora was built without CUDA operators"
)
N, K, R = 1024, 2048, 16


def problem(m: int, dtype=torch.float16):
    """A random problem; float16 because every supported GPU has tensor cores for it."""
    w = qlora.quantize(torch.randn(N, K, device="cuda"))
    x, grad = (torch.randn(m, c, device="cuda", dtype=dtype) for c in (K, N))
    a, b = torch.randn(R, K, device="cuda", dtype=dtype), torch.randn(N, R, device="cuda", dtype=dtype)
    return (*w.tensors, [N, K], "nf4", 64), x, grad, a, b


def both_ways(weight, x, grad, a, b):
    y = ops.forward(x, *weight, a, b, 0.5)
    return (y, *torch.ops.qlora.backward(grad, x, *weight, a, b, 0.5, None, True, True, False, True))


@pytest.mark.parametrize("m", [1, 16, 200])
def test_a_captured_graph_follows_its_inputs(m):
    weight, x, grad, a, b = problem(m)
    both_ways(weight, x, grad, a, b)  # warm up: loads modules and requests shared memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(weight, x, grad, a, b)
    for _ in range(2):
        x.normal_(), grad.normal_()
        graph.replay()
        for one, other in zip(captured, both_ways(weight, x, grad, a, b), strict=True):
            assert torch.equal(one, other)


COLD = """
import torch, qlora
from qlora import ops
torch.manual_seed(0)
w = qlora.quantize(torch.randn(1024, 2048, device="cuda"))
weight = (*w.tensors, [1024, 2048], "nf4", 64)
x = torch.randn({m}, 2048, device="cuda", dtype=torch.float16)
a, b = torch.randn(16, 2048, device="cuda"), torch.randn(1024, 16, device="cuda")
x @ torch.randn(2048, 8, device="cuda", dtype=torch.float16)  # cuBLAS must create its workspace outside a graph
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = ops.forward(x, *weight, a, b, 0.5)
graph.replay()
assert torch.equal(y, ops.forward(x, *weight, a, b, 0.5))
"""


@pytest.mark.parametrize("m", [1, 40, 400, 600])
def test_a_kernel_may_be_started_for_the_first_time_in_a_capture(m):
    """In a separate process, because a kernel is loaded and requests its shared memory at its first launch."""
    result = subprocess.run([sys.executable, "-c", COLD.format(m=m)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("m", [1, 40, 400, 600])
def test_autocast_and_compile(m):
    weight, x, _, a, b = problem(m, torch.float32)
    with torch.autocast("cuda", torch.float16):
        y = ops.forward(x, *weight, a, b, 0.5)
    assert y.dtype == torch.float16
    assert torch.equal(y, ops.forward(x.half(), *weight, a, b, 0.5))

    def both(x, a, b):
        return ops.forward(x, *weight, a, b, 0.5).square().mean()

    gradients = []
    for function in (both, torch.compile(both, fullgraph=True)):
        leaves = [t.half().requires_grad_() for t in (x, a, b)]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-2, atol=2e-3 * eager.abs().max().item())


@pytest.mark.parametrize("allowed", [True, False])
def test_dequantize_matmul_keeps_torchs_switch_for_reduced_precision(allowed, monkeypatch):
    """Many tokens use torch's GEMM, so the error equals torch's with either setting."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", allowed)
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("no bfloat16 tensor cores")
    weight, x, _, _, _ = problem(2048, torch.bfloat16)
    dense = ops.dequantize(*weight, torch.bfloat16)
    expected = x.double() @ dense.double().T
    ours, torchs = ops.forward(x, *weight), x @ dense.T
    errors = [(y.double() - expected).square().mean().sqrt() for y in (ours, torchs)]
    assert errors[0] <= 1.01 * errors[1]


def test_captured_batches_of_many_adapters():
    m = 100
    weight, x, grad, _, _ = problem(m)
    a, b = torch.randn(5, R, K, device="cuda"), torch.randn(5, N, R, device="cuda")
    scaling, of_row = torch.ones(5, device="cuda"), torch.arange(m, device="cuda") % 6 - 1
    ops.forward_multi(x, *weight, a, b, scaling, of_row)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.forward_multi(x, *weight, a, b, scaling, of_row)
        grads = torch.ops.qlora.backward.multi(grad, x, *weight, a, b, scaling, of_row, True, True, False)
    of_row.copy_(of_row.roll(7))
    graph.replay()
    assert torch.equal(y, ops.forward_multi(x, *weight, a, b, scaling, of_row))
    again = torch.ops.qlora.backward.multi(grad, x, *weight, a, b, scaling, of_row, True, True, False)
    for one, other in zip(grads, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("m", [1, 16, 65, 1500])
def test_bitwise_the_same_on_every_run(m):
    arguments = problem(m)
    first = both_ways(*arguments)
    for _ in range(20):
        for one, other in zip(first, both_ways(*arguments), strict=True):
            assert torch.equal(one, other)


def test_streams_do_not_disturb_each_other():
    problems = [problem(m) for m in (1, 16, 70, 200)]
    expected = [both_ways(*p) for p in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in problems]
    for _ in range(10):
        results = []
        for stream, arguments in zip(streams, problems, strict=True):
            with torch.cuda.stream(stream):
                results.append(both_ways(*arguments))
        torch.cuda.synchronize()
        for ours, right in zip(results, expected, strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, right, strict=True))


def test_work_goes_to_the_current_stream():
    weight, x, _, _, _ = problem(1)
    y = ops.forward(x, *weight)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        later = ops.forward(x, *weight)
        assert not stream.query()  # the stream is still busy with the sleep
    torch.cuda.synchronize()
    assert torch.equal(later, y)


def test_nothing_waits_for_the_gpu():
    weight, x, grad, a, b = problem(200)
    both_ways(weight, x, grad, a, b)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(weight, x, grad, a, b)
        qlora.ops.quantize(torch.zeros(64, 64, device="cuda"), double_quant=False, check_finite=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("m", [16, 200, 2048])
def test_no_dense_copy_of_a_large_weight(m):
    """A panel of dequantize_matmul is at most 128 MiB."""
    n, k = 16384, 8192
    w = qlora.quantize(torch.randn(n, k, device="cuda"))
    weight = (*w.tensors, [n, k], "nf4", 64)
    x, grad = (torch.randn(m, c, device="cuda", dtype=torch.float16) for c in (k, n))
    for call, result in (
        (lambda: ops.forward(x, *weight), m * n * 2),
        (
            lambda: torch.ops.qlora.backward(grad, x, *weight, None, None, 1.0, None, True, False, False, False),
            m * k * 2,
        ),
    ):
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        workspace = torch.cuda.max_memory_allocated() - before - result
        assert workspace <= 129 << 20


def test_the_device_of_the_tensors_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    w = qlora.quantize(torch.randn(N, K, device="cuda:1"))
    y = ops.forward(torch.randn(3, K, device="cuda:1"), *w.tensors, w.shape, "nf4", 64)
    assert y.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


def test_more_than_two_to_the_31_elements():
    n, k = 2**19 + 64, 4096
    if torch.cuda.mem_get_info()[0] < 3 * n * k * 2:
        pytest.skip(f"needs {3 * n * k * 2 >> 30} GiB of GPU memory")
    weight = torch.randn(n, k, device="cuda", dtype=torch.float16)
    w = qlora.quantize(weight)
    last = qlora.quantize(weight[-64:], double_quant=False).dequantize(torch.float16)
    assert (w.dequantize(torch.float16)[-64:] - last).abs().max() < 0.1
    x = torch.randn(2, k, device="cuda", dtype=torch.float16)
    y = ops.forward(x, *w.tensors, w.shape, "nf4", 64)
    expected = x.double() @ w.dequantize(torch.float16)[-64:].double().T
    assert (y[:, -64:].double() - expected).abs().max() < 0.05 * expected.abs().max()
