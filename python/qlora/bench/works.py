"""Defines the benchmarked works: products, their gradients, quantization, batches of several adapters."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora import ops
from qlora.bench.measure import ROUND_SECONDS, Contender, Limits, cache_bytes
from qlora.weight import QuantizedWeight, quantize

PEERS = ("torch", "bitsandbytes")
MOST_DENSE_BYTES = 2 << 30  # limit for the dense form of all copies of a weight
ADAPTERS = 16  # adapters in a batch of `multi`


@dataclass(frozen=True)
class Case:
    """What a work consists of in the process that measures it: its cost, and how to prepare each contender."""

    flops: float
    size_bytes: float  # minimum bytes to read and write, with 4-bit weights
    prepare: Mapping[str, Callable[[], Contender]]
    copies: int = 1


@dataclass(frozen=True)
class Work:
    """One line of the report. It can be pickled; ``build`` runs in the process that measures."""

    name: str
    extents: Mapping[str, int]  # m, n, k, r
    contenders: tuple[str, ...]
    product_flops: float  # of the products with weights, before the work is built
    build: Callable[[], Case] = field(repr=False)
    graphs: bool = True  # on a GPU, time CUDA graphs

    def label(self) -> str:
        return f"{self.name} {sizes(self.extents)}"

    def share(self, limits: Limits) -> float:
        """Presumable seconds of a round at this machine's limit, for the progress bar."""
        return len(self.contenders) * (ROUND_SECONDS + self.product_flops / limits.flops_per_s)


def sizes(extents: Mapping[str, int]) -> str:
    return " ".join(f"{key}={value}" for key, value in extents.items() if value)


def _copies(read_bytes: int, dense_bytes: int, device: torch.device) -> int:
    """Number of copies of a weight that together exceed the last-level cache, within MOST_DENSE_BYTES."""
    cache = cache_bytes() if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(2 * cache // read_bytes + 1, MOST_DENSE_BYTES // dense_bytes))


@dataclass(frozen=True)
class Weights:
    """The same weights in every contender's form. Each form is made when it is first used."""

    n: int
    k: int
    dtype: torch.dtype
    device: torch.device
    rank: int

    @functools.cached_property
    def copies(self) -> int:
        return _copies(self.n * self.k // 2, 2 * self.n * self.k, self.device)

    def _originals(self) -> Iterator[Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        base = torch.randn(self.n, self.k, device=self.device, generator=generator)
        for i in range(self.copies):
            yield base.roll(977 * (i % 8))  # different weights at little cost

    @functools.cached_property
    def ours(self) -> list[QuantizedWeight]:
        return [quantize(w) for w in self._originals()]

    @functools.cached_property
    def dense(self) -> list[Tensor]:
        return [w.to(self.dtype) for w in self._originals()]

    @functools.cached_property
    def theirs(self) -> list[Any]:
        from bitsandbytes import functional

        return [
            functional.quantize_4bit(w.to(self.dtype), compress_statistics=True, quant_type="nf4")
            for w in self._originals()
        ]

    @functools.cached_property
    def adapter(self) -> tuple[Tensor, Tensor] | None:
        return (self.random(self.rank, self.k), self.random(self.n, self.rank)) if self.rank else None

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def contenders(self, x: Tensor, adapter: tuple[Tensor, Tensor] | None) -> dict[str, Callable[[], Contender]]:
        """Prepares functions that compute y = x Wᵀ + x aᵀ bᵀ, by contender."""
        a, b = adapter or (None, None)

        def low_rank(y: Tensor) -> Tensor:
            return y if a is None or b is None else y + F.linear(F.linear(x, a), b)

        def ours() -> Contender:
            weights = self.ours
            return lambda i: ops.forward(x, *weights[i].arguments, a, b)

        def dense() -> Contender:
            weights = self.dense
            return lambda i: low_rank(F.linear(x, weights[i]))

        def theirs() -> Contender:
            from bitsandbytes import matmul_4bit

            weights = self.theirs

            def call(i: int) -> Tensor:
                packed, state = weights[i]
                return low_rank(matmul_4bit(x, packed.t(), quant_state=state))

            return call

        return {"qlora": ours, "torch": dense, "bitsandbytes": theirs}

    def cost(self, m: int, with_adapter: bool) -> tuple[float, float]:
        """FLOPs, and bytes of the weight, tokens, results and adapter."""
        r, size = self.rank if with_adapter else 0, self.dtype.itemsize
        flops = 2.0 * m * (self.n * self.k + r * (self.n + self.k))
        return flops, self.ours[0].nbytes + size * (m * (self.n + self.k) + r * (self.n + self.k))


@functools.lru_cache(maxsize=1)
def _weights(n: int, k: int, dtype: torch.dtype, device: torch.device, rank: int) -> Weights:
    """The weights of one shape, which its works share."""
    return Weights(n, k, dtype, device, rank)


def _without_grad(prepare: Callable[[], Contender]) -> Callable[[], Contender]:
    def prepared() -> Contender:
        contender = prepare()

        def run(i: int) -> object:
            with torch.no_grad():
                return contender(i)

        return run

    return prepared


def forward_case(weights_of: Callable[[], Weights], m: int, with_adapter: bool) -> Case:
    weights = weights_of()
    x = weights.random(m, weights.k)
    contenders = weights.contenders(x, weights.adapter if with_adapter else None)
    prepare = {name: _without_grad(contender) for name, contender in contenders.items()}
    return Case(*weights.cost(m, with_adapter), prepare, weights.copies)


def backward_case(weights_of: Callable[[], Weights], m: int) -> Case:
    """Gradients of x, lora_a and lora_b, by backward passes through graphs that are built before timing."""
    weights = weights_of()
    x, grad = weights.random(m, weights.k).requires_grad_(), weights.random(m, weights.n)
    adapter = None
    if weights.adapter:
        a, b = weights.adapter
        adapter = a.clone().requires_grad_(), b.clone().requires_grad_()
    leaves = [x, *(adapter or ())]
    graphs = max(2, min(weights.copies, MOST_DENSE_BYTES // (m * weights.n * weights.dtype.itemsize)))

    def gradients(prepare: Callable[[], Contender]) -> Callable[[], Contender]:
        def prepared() -> Contender:
            contender = prepare()
            outputs: list[Any] = [contender(i) for i in range(graphs)]
            return lambda i: torch.autograd.grad(outputs[i], leaves, grad, retain_graph=True)

        return prepared

    prepare = {name: gradients(contender) for name, contender in weights.contenders(x, adapter).items()}
    flops, size = weights.cost(m, weights.rank > 0)
    lora_flops = 2.0 * m * weights.rank * (weights.n + weights.k)  # of both factors' gradients
    size += m * weights.k * weights.dtype.itemsize  # x is read, and dx written
    return Case(flops + lora_flops, size, prepare, graphs)


def multi_case(weights_of: Callable[[], Weights], m: int) -> Case:
    """A batch with ADAPTERS different adapters, compared with one adapter for all rows."""
    weights = weights_of()
    lora_a = weights.random(ADAPTERS, weights.rank, weights.k)
    lora_b = weights.random(ADAPTERS, weights.n, weights.rank)
    scaling = torch.ones(ADAPTERS, device=weights.device)
    x = weights.random(m, weights.k)
    of_row = torch.arange(m, device=weights.device) % ADAPTERS

    def many() -> Contender:
        ours = weights.ours
        return lambda i: ops.forward_multi(x, *ours[i].arguments, lora_a, lora_b, scaling, of_row)

    one = weights.contenders(x, weights.adapter)["qlora"]
    flops, size = weights.cost(m, True)
    size += (min(m, ADAPTERS) - 1) * weights.rank * (weights.n + weights.k) * weights.dtype.itemsize
    return Case(flops, size, {"qlora": _without_grad(many), "one adapter": _without_grad(one)}, weights.copies)


def quantize_case(weights_of: Callable[[], Weights]) -> Case:
    """Quantizes float32 to NF4 with double quantization."""
    weights = weights_of()
    size = 4 * weights.n * weights.k
    copies = _copies(size, size, weights.device)
    sources = [torch.randn(weights.n, weights.k, device=weights.device) for _ in range(copies)]

    def theirs() -> Contender:
        from bitsandbytes.functional import quantize_4bit

        return lambda i: quantize_4bit(sources[i], compress_statistics=True, quant_type="nf4")

    prepare = {"qlora": lambda: lambda i: ops.quantize(sources[i]), "bitsandbytes": theirs}
    return Case(0.0, size + weights.ours[0].nbytes, prepare, copies)


def dequantize_case(weights_of: Callable[[], Weights]) -> Case:
    """Dequantizes NF4 with double quantization to the dtype of the tokens."""
    weights = weights_of()

    def ours() -> Contender:
        return lambda i: weights.ours[i].dequantize(weights.dtype)

    def theirs() -> Contender:
        from bitsandbytes.functional import dequantize_4bit

        packed = weights.theirs
        return lambda i: dequantize_4bit(*packed[i])

    size = weights.n * weights.k * weights.dtype.itemsize + weights.ours[0].nbytes
    return Case(0.0, size, {"qlora": ours, "bitsandbytes": theirs}, weights.copies)


def works_of_shape(
    wanted: Sequence[str],
    shape: tuple[int, int],
    tokens: Sequence[int],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    peers: Sequence[str],
) -> Iterator[Work]:
    n, k = shape
    weights_of = functools.partial(_weights, n, k, dtype, device, rank)

    def work(name: str, m: int, with_adapter: bool, build: Callable[..., Case], *arguments: object) -> Work:
        extents = {"m": m, "n": n, "k": k, "r": rank if with_adapter else 0}
        contenders = ("qlora", *(("one adapter",) if name == "multi" else ()), *peers)
        return Work(name, extents, contenders, 2.0 * m * n * k, functools.partial(build, weights_of, *arguments))

    if "forward" in wanted:
        for m in tokens:
            for adapted in (False, True) if rank else (False,):
                yield work("forward", m, adapted, forward_case, m, adapted)
    if "backward" in wanted:
        for m in tokens:
            if m > 1:  # nobody trains on one token
                yield work("backward", m, rank > 0, backward_case, m)
    if "multi" in wanted and rank:
        for m in tokens:
            yield work("multi", m, True, multi_case, m)
    if "quantize" in wanted:
        yield work("quantize", 0, False, quantize_case)
        yield work("dequantize", 0, False, dequantize_case)
