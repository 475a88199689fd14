"""The fused 4-bit operation against torch's own dense matmul in the same dtype, forward and backward.

A and B alternate in one process; weights rotate over more memory than the last-level cache holds; the figures are
medians of time ratios. Usage: python benchmarks/matmul.py [--n 4096] [--k 4096] [--dtype bf16] [--rank 16]
"""

import argparse
import statistics
import time

import torch
from torch.nn import functional as F

import qlora
from qlora import _C

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROTATION_BYTES = 256 * 2**20  # dense bytes of all weights together: past the last-level cache
PAIRS = 15


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def compare(ours, dense, count: int) -> tuple[float, float, float, float]:
    """Medians of ours and dense in milliseconds, of their ratio, and the spread of the ratio (quartiles)."""
    pairs = []
    for i in range(PAIRS + 2):
        pair = seconds(lambda i=i: ours(i % count)), seconds(lambda i=i: dense(i % count))
        if i >= 2:  # two warm-up rounds
            pairs.append(pair)
    ratios = [a / b for a, b in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    ours_ms, dense_ms = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    return ours_ms, dense_ms, statistics.median(ratios), high - low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    arguments = parser.parse_args()
    n, k, dtype = arguments.n, arguments.k, DTYPES[arguments.dtype]
    count = max(2, ROTATION_BYTES // (n * k * dtype.itemsize))
    weights = [torch.randn(n, k) for _ in range(count)]
    packed = [qlora.quantize(w) for w in weights]
    dense = [w.to(dtype) for w in weights]
    a, b = torch.randn(arguments.rank, k, dtype=dtype), torch.randn(n, arguments.rank, dtype=dtype)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, isa {_C.active_isa()}")
    print(
        f"n={n} k={k} {arguments.dtype} nf4 block 64 double-quantized, rank {arguments.rank}, {count} weights in turn"
    )
    print(f"{'m':>5} {'what':<14} {'ours ms':>9} {'dense ms':>9} {'ratio':>7} {'spread':>7} {'GFLOP/s':>9} {'GB/s':>6}")

    def show(m, label, ours, reference, flops):
        ours_ms, dense_ms, ratio, spread = compare(ours, reference, count)
        bandwidth = packed[0].nbytes / ours_ms / 1e6
        print(
            f"{m:>5} {label:<14} {ours_ms:>9.3f} {dense_ms:>9.3f} {ratio:>7.2f} {spread:>7.2f}"
            f" {flops / ours_ms / 1e6:>9.0f} {bandwidth:>6.1f}"
        )

    for m in arguments.m:
        x = torch.randn(m, k, dtype=dtype)
        flops = 2 * m * n * k
        with torch.no_grad():
            show(
                m,
                "base",
                lambda i, x=x: qlora.ops.forward(x, *packed[i].tensors, (n, k), "nf4", 64),
                lambda i, x=x: F.linear(x, dense[i]),
                flops,
            )
            show(
                m,
                "with adapter",
                lambda i, x=x: qlora.ops.forward(x, *packed[i].tensors, (n, k), "nf4", 64, a, b),
                lambda i, x=x: F.linear(x, dense[i]) + F.linear(F.linear(x, a), b),
                flops + 2 * m * arguments.rank * (n + k),
            )
        leaf, grad = x.clone().requires_grad_(), torch.randn(m, n, dtype=dtype)
        a_, b_ = a.clone().requires_grad_(), b.clone().requires_grad_()

        def train_ours(i, leaf=leaf, grad=grad, a_=a_, b_=b_):
            qlora.ops.forward(leaf, *packed[i].tensors, (n, k), "nf4", 64, a_, b_).backward(grad)

        def train_dense(i, leaf=leaf, grad=grad, a_=a_, b_=b_):
            (F.linear(leaf, dense[i]) + F.linear(F.linear(leaf, a_), b_)).backward(grad)

        if m >= 16:
            show(m, "forw.+backward", train_ours, train_dense, 2 * flops)


if __name__ == "__main__":
    main()
