"""QLoRALinear: a 4-bit base and named low-rank adapters, computed in one fused operation."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora import ops
from qlora.nn.linear4bit import Linear4bit, dense_linear
from qlora.nn.merging import MergeInto, MergeReport, low_rank_delta, merged_weight
from qlora.nn.replacing import has_hooks, loaded, require_plain
from qlora.nn.shared_input import Product, shared_result
from qlora.weight import QuantizedWeight, quantize


@dataclass(frozen=True)
class AdapterSettings:
    """The settings of one adapter of a layer: rank, alpha and dropout."""

    rank: int
    alpha: float
    dropout: float

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True)
class _Merged:
    adapter: str
    weight: Tensor | QuantizedWeight


def check_adapter(rank: int, dropout: float) -> None:
    """Raises ValueError for a rank below 1 or a dropout outside [0, 1)."""
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout} must be in [0, 1)")


class _StraightThrough(torch.autograd.Function):
    """Quantizes and dequantizes; the gradient passes unchanged (straight-through: Bengio et al. 2013)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> Tensor:
        return quantize(weight, quant_type, block_size, double_quant).dequantize(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None, None


class QLoRALinear(nn.Module):
    """``y = x Wᵀ + bias + alpha / rank * dropout(x) Aᵀ Bᵀ`` with W frozen in 4 bit (Dettmers et al. 2023, eq. 5).

    Args:
        base: the layer to adapt. An ``nn.Linear`` is quantized; a ``Linear4bit`` is used as it is.
        rank: r of ``lora_a`` [r, in] and ``lora_b`` [out, r].
        alpha: numerator of the scaling; defaults to rank.
        quant_type, double_quant, block_size: how an ``nn.Linear`` base is quantized.
        freeze_base: False keeps a trainable full-precision weight, quantized in each forward with a straight-through
            gradient.
        dropout: dropout probability of the adapter's input.
        cache_dequantized: keep a dense copy of W in the dtype of x after the first forward, and use torch's matmul.
            Needs more memory.
        adapter_dtype: dtype of the adapters, which may be float32 when activations are bfloat16.

    Raises ValueError for a rank below 1, a dropout outside [0, 1), or options that contradict each other, and TypeError
    for a base of another class.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float | None = None,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        freeze_base: bool = True,
        dropout: float = 0.0,
        cache_dequantized: bool = False,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base is a {type(base).__name__}: QLoRALinear adapts nn.Linear and Linear4bit")
        if not isinstance(base, Linear4bit):
            require_plain(base, nn.Linear)
        if cache_dequantized and not freeze_base:
            raise ValueError("cache_dequantized=True needs freeze_base=True: a trained base changes at every step")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.freeze_base, self.cache_dequantized = freeze_base, cache_dequantized
        self.adapter_dtype = adapter_dtype
        self.quantization_error: float | None = None  # relative, of the base; None if it was already 4-bit
        self.base: nn.Linear
        if isinstance(base, Linear4bit):
            if not freeze_base:
                raise ValueError("freeze_base=False needs a full-precision base: a Linear4bit has none")
            self.base = base
            self.quant_type, self.block_size = base.quant_type, base.block_size
            self.double_quant = base.nested_absmax.numel() > 0
        elif freeze_base:
            self.base = Linear4bit.from_linear(base, quant_type, double_quant, block_size)
            self.quantization_error = self.base.quantized_weight.error_against(base.weight)[0]
        else:
            self.base = base
            base.requires_grad_(True)
        self.lora_a = nn.ParameterDict()  # name -> [rank, in]
        self.lora_b = nn.ParameterDict()  # name -> [out, rank]
        self.adapters: dict[str, AdapterSettings] = {}
        self.active_adapter: str | None = None
        self.adapters_enabled = True
        self._merged: _Merged | None = None
        self._dense: Tensor | None = None
        self._warned_merged = False
        self.add_adapter("default", rank, alpha, dropout)

    # ---- adapters ----

    @torch.inference_mode(False)
    def add_adapter(self, name: str, rank: int, alpha: float | None = None, dropout: float = 0.0) -> None:
        """Adds an adapter and makes it active. Its initial effect is zero: A is random, B is zero (Hu et al. 2021).

        Raises ValueError for a name that exists, is empty, has a dot or is reserved, and for a bad rank or dropout.
        """
        check_adapter(rank, dropout)
        if not name or "." in name:
            raise ValueError(f"adapter name '{name}' must be non-empty and without dots")
        if name in self.adapters:
            raise ValueError(f"adapter '{name}' exists already: the layer has {sorted(self.adapters)}")
        if hasattr(self.lora_a, name):
            raise ValueError(f"adapter name '{name}' is reserved (an attribute of ParameterDict): choose another")
        device = self.base.weight.device
        a = torch.empty(rank, self.in_features, dtype=self.adapter_dtype, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.lora_a[name] = nn.Parameter(a)
        self.lora_b[name] = nn.Parameter(torch.zeros(self.out_features, rank, dtype=self.adapter_dtype, device=device))
        self.adapters[name] = AdapterSettings(rank, float(rank if alpha is None else alpha), dropout)
        self.set_adapter(name)

    def set_adapter(self, name: str) -> None:
        """Makes ``name`` the active and only trainable adapter. Raises KeyError if it does not exist."""
        self._require(name)
        self._forbid_while_merged("set_adapter")
        self.active_adapter = name
        for other in self.adapters:
            self.lora_a[other].requires_grad_(other == name)
            self.lora_b[other].requires_grad_(other == name)

    def deactivate(self) -> None:
        """Makes no adapter active or trainable, so that the layer computes only its base."""
        self._forbid_while_merged("deactivate")
        self.active_adapter = None
        self.lora_a.requires_grad_(False)
        self.lora_b.requires_grad_(False)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter; afterwards none is active if it was the active one. Raises KeyError if it is missing."""
        self._require(name)
        self._forbid_while_merged("delete_adapter")
        del self.lora_a[name], self.lora_b[name], self.adapters[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def enable_adapters(self) -> None:
        self.adapters_enabled = True

    def disable_adapters(self) -> None:
        self._forbid_while_merged("disable_adapters")
        self.adapters_enabled = False

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Disables adapters inside a ``with`` block."""
        before = self.adapters_enabled
        self.disable_adapters()
        try:
            yield
        finally:
            self.adapters_enabled = before

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            raise KeyError(f"adapter '{name}' does not exist: the layer has {sorted(self.adapters)}")

    def _forbid_while_merged(self, what: str) -> None:
        if self._merged is not None:
            raise RuntimeError(f"{what}: adapter '{self._merged.adapter}' is merged; call unmerge() first")

    # ---- forward ----

    @property
    def weight(self) -> Tensor:
        """The base's weight parameter (uint8 if frozen), for code that reads the weight of linear layers."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def fused_product(self) -> Product | None:
        """The one fused operation that :meth:`forward` is, for a group of layers with one input; None if it is not."""
        name, modules = self.active_adapter, self._modules
        base: Any = modules["base"]
        if self._merged is not None or name is None or not self.adapters_enabled or self.cache_dequantized:
            return None
        settings = self.adapters[name]
        lora_a: Any = modules["lora_a"]
        lora_b: Any = modules["lora_b"]
        drops = settings.dropout > 0 and self.training
        if drops or not isinstance(base, Linear4bit) or has_hooks(base, lora_a, lora_b):
            return None
        return Product(base, lora_a._parameters[name], lora_b._parameters[name], settings.scaling)

    def forward(self, x: Tensor) -> Tensor:
        shared = shared_result(self, x)
        if shared is not None:
            return shared
        if self._merged is not None:
            return self._forward_merged(x, self._merged.weight)
        if not (self.adapters_enabled and self.active_adapter is not None):
            return self._forward_base(x)
        name = self.active_adapter
        settings = self.adapters[name]
        modules: Any = self._modules  # as in Linear4bit.run, because attributes of a module are slow to find
        base, lora_a, lora_b = modules["base"], modules["lora_a"], modules["lora_b"]
        dropped = F.dropout(x, settings.dropout) if settings.dropout > 0 and self.training else None
        if isinstance(base, Linear4bit) and not self.cache_dequantized and not has_hooks(base, lora_a, lora_b):
            return base.run(x, lora_a._parameters[name], lora_b._parameters[name], settings.scaling, dropped)
        with loaded(lora_a, lora_b):
            a, b = lora_a[name], lora_b[name]
            low_rank = F.linear(F.linear((x if dropped is None else dropped).to(a.dtype), a), b)
            return self._forward_base(x) + (settings.scaling * low_rank).to(x.dtype)

    def _forward_base(self, x: Tensor) -> Tensor:
        if not isinstance(self.base, Linear4bit):
            weight = _StraightThrough.apply(self.base.weight, self.quant_type, self.block_size, self.double_quant)
            bias = self.base.bias
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if not self.cache_dequantized:
            return self.base(x)
        if self._dense is None or self._dense.dtype != x.dtype:
            with torch.inference_mode(False):  # the cached weight must work in later training steps
                self._dense = self.base.dequantize(x.dtype)
        bias = self.base.bias
        return F.linear(x, self._dense, None if bias is None else bias.to(x.dtype))

    def _forward_merged(self, x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
        if self.training and torch.is_grad_enabled() and not self._warned_merged:
            warnings.warn("this layer is merged: its adapter gets no gradient until unmerge()", stacklevel=3)
            self._warned_merged = True
        bias = self.base.bias
        if isinstance(weight, Tensor):
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        compute = getattr(self.base, "compute_dtype", None) or x.dtype
        y = ops.forward(x.to(compute), *weight.arguments, bias=bias)
        return y.to(x.dtype)

    # ---- merging ----

    @property
    def merged_adapter(self) -> str | None:
        return self._merged.adapter if self._merged else None

    def base_weight(self) -> QuantizedWeight:
        """The 4-bit weight that the forward uses."""
        if isinstance(self.base, Linear4bit):
            return self.base.quantized_weight
        return quantize(self.base.weight, self.quant_type, self.block_size, self.double_quant)

    @torch.no_grad()
    def exact_weight(self, name: str) -> Tensor:
        """The sum of the base and an adapter as a float32 weight (out, in)."""
        delta = low_rank_delta(self.lora_a[name], self.lora_b[name], self.adapters[name].scaling)
        return self.base_weight().dequantize(torch.float32) + delta

    @torch.no_grad()
    def merge(
        self,
        name: str | None = None,
        *,
        requantize: bool = False,
        dtype: torch.dtype | None = None,
        search_scales: bool = False,
    ) -> MergeReport:
        """Merges an adapter into the weight that the forward uses. The base is kept, so :meth:`unmerge` is exact.

        Args:
            name: the adapter (default: the active one).
            requantize: store the merged weight in the base's 4-bit format instead of ``dtype``.
            search_scales: with ``requantize``, search the scale of each block for the least squared error.
            dtype: dtype of the dense merged weight (default: the base's dtype before quantization).

        Returns the error that the merged format adds, measured against the float32 sum. Raises RuntimeError if an
        adapter is merged already or none is active, KeyError for an unknown name, and ValueError for contradicting
        options.
        """
        self._forbid_while_merged("merge")
        into = MergeInto(requantize, dtype, search_scales)
        name = name or self.active_adapter
        if name is None:
            raise RuntimeError("merge: no adapter is active; pass the name of one")
        self._require(name)
        merged, report = merged_weight(self.exact_weight(name), self.base_weight(), into, name)
        self._merged = _Merged(name, merged)
        return report

    def unmerge(self) -> None:
        """Restores base and adapter bit for bit as before :meth:`merge`. Raises RuntimeError if nothing is merged."""
        if self._merged is None:
            raise RuntimeError("unmerge: no adapter is merged")
        self._merged = None

    def merged_linear(self) -> nn.Linear:
        """The merged layer without adapters: ``Linear4bit`` if requantized, else a dense ``nn.Linear``.

        Raises RuntimeError if nothing is merged.
        """
        if self._merged is None:
            raise RuntimeError("merged_linear: call merge() first")
        weight, base = self._merged.weight, self.base
        if isinstance(base, Linear4bit):
            return base.twin(weight, base.bias)
        if isinstance(weight, QuantizedWeight):
            return Linear4bit.from_weight(weight, base.bias).train(base.training)
        return dense_linear(weight, base.bias).train(base.training)

    # ---- state ----

    def reset_state(self) -> None:
        """Drops the cached dense weight; the next forward rebuilds it."""
        self._dense = None

    def diagnostics(self) -> dict[str, Any]:
        """Bytes by kind, bits per weight, adapter names, and the base's relative quantization error.

        The error is None if the base was already 4-bit.
        """
        base = self.base
        statistics = 0
        if isinstance(base, Linear4bit):
            statistics = sum(t.nbytes for t in base.quantized_weight.tensors[1:])
        adapters = sum(p.nbytes for p in (*self.lora_a.values(), *self.lora_b.values()))
        return {
            "base_bytes": base.weight.nbytes,
            "statistics_bytes": statistics,
            "bias_bytes": 0 if base.bias is None else base.bias.nbytes,
            "adapter_bytes": adapters,
            "cache_bytes": 0 if self._dense is None else self._dense.nbytes,
            "bits_per_param": 8 * (base.weight.nbytes + statistics) / max(1, self.in_features * self.out_features),
            "quantization_error": self.quantization_error,
            "active_adapter": self.active_adapter if self.adapters_enabled else None,
            "merged_adapter": self.merged_adapter,
        }

    def _apply(self, fn: Any, recurse: bool = True) -> "QLoRALinear":
        self.reset_state()
        super()._apply(fn, recurse)
        if self._merged is not None:
            weight = self._merged.weight
            moved = fn(weight) if isinstance(weight, Tensor) else weight.to(self.base.weight.device)
            self._merged = _Merged(self._merged.adapter, moved)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forbid_while_merged("load_state_dict")
        self.reset_state()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        settings = ", ".join(f"{name}: r={s.rank} alpha={s.alpha:g}" for name, s in self.adapters.items())
        return f"adapters=({settings}), active={self.active_adapter!r}"
