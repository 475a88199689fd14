"""Defines the benchmarked works: products, their gradients, quantization, batches of several adapters."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora import ops
from qlora.bench.measure import Contender, cache_bytes
from qlora.weight import QuantizedWeight, quantize

PEERS = ("torch", "bitsandbytes")
MOST_DENSE_BYTES = 2 << 30  # limit for the dense form of all copies of a weight
ADAPTERS = 16  # adapters in a batch of `multi`


@dataclass(frozen=True)
class Work:
    """One line of the report."""

    name: str
    extents: Mapping[str, int]  # m, n, k, r
    flops: float
    size_bytes: float  # minimum bytes to read and write, with 4-bit weights
    contenders: Mapping[str, Contender] = field(repr=False)
    copies: int = 1


def require_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError("--compare bitsandbytes needs it installed: pip install bitsandbytes") from error
    return bitsandbytes


def _copies(read_bytes: int, dense_bytes: int, device: torch.device) -> int:
    """Number of copies of a weight that together exceed the last-level cache, within MOST_DENSE_BYTES."""
    cache = cache_bytes() if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(2 * cache // read_bytes + 1, MOST_DENSE_BYTES // dense_bytes))


class Weights:
    """The same weights in every contender's form."""

    def __init__(self, n: int, k: int, dtype: torch.dtype, device: torch.device, peers: Sequence[str], rank: int):
        self.n, self.k, self.dtype, self.device, self.rank = n, k, dtype, device, rank
        self.copies = _copies(n * k // 2, 2 * n * k, device)
        base = torch.randn(n, k, device=device)
        rolled = [base.roll(977 * i) for i in range(min(self.copies, 8))]  # different weights at little cost
        originals = [rolled[i % len(rolled)] for i in range(self.copies)]
        self.ours: list[QuantizedWeight] = [quantize(w) for w in originals]
        self.dense = [w.to(dtype) for w in originals] if "torch" in peers else []
        self.theirs = []
        if "bitsandbytes" in peers:
            functional = require_bitsandbytes().functional
            self.theirs = [
                functional.quantize_4bit(w.to(dtype), compress_statistics=True, quant_type="nf4") for w in originals
            ]
        self.a = torch.randn(rank, k, device=device, dtype=dtype) if rank else None
        self.b = torch.randn(n, rank, device=device, dtype=dtype) if rank else None

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def contenders(self, x: Tensor, a: Tensor | None, b: Tensor | None) -> dict[str, Contender]:
        """Functions that compute y = x Wᵀ + x aᵀ bᵀ, by contender."""

        def low_rank(y: Tensor) -> Tensor:
            return y if a is None or b is None else y + F.linear(F.linear(x, a), b)

        def ours(i: int) -> Tensor:
            w = self.ours[i]
            return ops.forward(x, *w.arguments, a, b)

        found: dict[str, Contender] = {"qlora": ours}
        if self.dense:
            found["torch"] = lambda i: low_rank(F.linear(x, self.dense[i]))
        if self.theirs:
            matmul_4bit = require_bitsandbytes().matmul_4bit

            def theirs(i: int) -> Tensor:
                packed, state = self.theirs[i]
                return low_rank(matmul_4bit(x, packed.t(), quant_state=state))

            found["bitsandbytes"] = theirs
        return found

    def extents(self, m: int, with_adapter: bool) -> dict[str, int]:
        return {"m": m, "n": self.n, "k": self.k, "r": self.rank if with_adapter else 0}

    def cost(self, m: int, with_adapter: bool) -> tuple[float, float]:
        """FLOPs, and bytes of the weight, tokens, results and adapter."""
        r, size = self.rank if with_adapter else 0, self.dtype.itemsize
        flops = 2.0 * m * (self.n * self.k + r * (self.n + self.k))
        return flops, self.ours[0].nbytes + size * (m * (self.n + self.k) + r * (self.n + self.k))


def _without_grad(contender: Contender) -> Contender:
    def run(i: int) -> object:
        with torch.no_grad():
            return contender(i)

    return run


def forward_works(weights: Weights, tokens: Sequence[int]) -> Iterator[Work]:
    for m in tokens:
        x = weights.random(m, weights.k)
        for a, b in ((None, None), (weights.a, weights.b)) if weights.rank else ((None, None),):
            contenders = {name: _without_grad(c) for name, c in weights.contenders(x, a, b).items()}
            flops, size = weights.cost(m, a is not None)
            yield Work("forward", weights.extents(m, a is not None), flops, size, contenders, weights.copies)


def _gradients(outputs: list, leaves: list[Tensor], grad: Tensor) -> Contender:
    return lambda i: torch.autograd.grad(outputs[i], leaves, grad, retain_graph=True)


def backward_works(weights: Weights, tokens: Sequence[int]) -> Iterator[Work]:
    """Gradients of x, lora_a and lora_b, by backward passes through graphs that are built before timing."""
    for m in tokens:
        if m < 2:
            continue
        x, grad = weights.random(m, weights.k).requires_grad_(), weights.random(m, weights.n)
        leaves = [x]
        a = b = None
        if weights.a is not None and weights.b is not None:
            a, b = weights.a.clone().requires_grad_(), weights.b.clone().requires_grad_()
            leaves += [a, b]
        graphs = max(2, min(weights.copies, MOST_DENSE_BYTES // (m * weights.n * weights.dtype.itemsize)))

        outputs = {
            name: [contender(i) for i in range(graphs)] for name, contender in weights.contenders(x, a, b).items()
        }
        contenders = {name: _gradients(graph, leaves, grad) for name, graph in outputs.items()}
        flops, size = weights.cost(m, weights.rank > 0)
        lora_flops = 2.0 * m * weights.rank * (weights.n + weights.k)  # of both factors' gradients
        size += m * weights.k * weights.dtype.itemsize  # x is read, and dx written
        yield Work("backward", weights.extents(m, weights.rank > 0), flops + lora_flops, size, contenders, graphs)


def multi_works(weights: Weights, tokens: Sequence[int]) -> Iterator[Work]:
    """A batch with ADAPTERS different adapters, compared with one adapter for all rows."""
    if not weights.rank:
        return
    lora_a = weights.random(ADAPTERS, weights.rank, weights.k)
    lora_b = weights.random(ADAPTERS, weights.n, weights.rank)
    scaling = torch.ones(ADAPTERS, device=weights.device)
    for m in tokens:
        x = weights.random(m, weights.k)
        of_row = torch.arange(m, device=weights.device) % ADAPTERS

        def many(i: int, x: Tensor = x, of_row: Tensor = of_row) -> Tensor:
            w = weights.ours[i]
            return ops.forward_multi(x, *w.arguments, lora_a, lora_b, scaling, of_row)

        one = weights.contenders(x, weights.a, weights.b)["qlora"]
        flops, size = weights.cost(m, True)
        size += (min(m, ADAPTERS) - 1) * weights.rank * (weights.n + weights.k) * weights.dtype.itemsize
        contenders = {"qlora": _without_grad(many), "one adapter": _without_grad(one)}
        yield Work("multi", weights.extents(m, True), flops, size, contenders, weights.copies)


def quantize_works(weights: Weights, peers: Sequence[str]) -> Iterator[Work]:
    """Quantizes float32 to NF4 with double quantization, and dequantizes to the dtype of the tokens."""
    size = 4 * weights.n * weights.k
    copies = _copies(size, size, weights.device)
    sources = [torch.randn(weights.n, weights.k, device=weights.device) for _ in range(copies)]
    packed_bytes, extents = weights.ours[0].nbytes, {"m": 0, "n": weights.n, "k": weights.k, "r": 0}
    down: dict[str, Contender] = {"qlora": lambda i: ops.quantize(sources[i])}
    back: dict[str, Contender] = {"qlora": lambda i: weights.ours[i].dequantize(weights.dtype)}
    if "bitsandbytes" in peers:
        functional = require_bitsandbytes().functional
        pack = functools.partial(functional.quantize_4bit, compress_statistics=True, quant_type="nf4")
        down["bitsandbytes"] = lambda i: pack(sources[i])
        back["bitsandbytes"] = lambda i: functional.dequantize_4bit(*weights.theirs[i])
    yield Work("quantize", extents, 0.0, size + packed_bytes, down, copies)
    dense_bytes = weights.n * weights.k * weights.dtype.itemsize
    yield Work("dequantize", extents, 0.0, dense_bytes + packed_bytes, back, weights.copies)
