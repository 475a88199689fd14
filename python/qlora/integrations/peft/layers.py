"""LoRA layers that PEFT uses on qlora's 4-bit layers: linear layers, embeddings and experts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper as PeftParamWrapper
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from qlora import ops
from qlora.devices import hint_slow_bfloat16
from qlora.nn import Embedding4bit, Linear4bit, MergeReport
from qlora.nn.linear4bit import dense_linear
from qlora.nn.merging import MergeInto, low_rank_delta, merged_weight, requantize
from qlora.nn.replacing import has_hooks
from qlora.nn.shared_input import Product, shared_result

_DENSE_INITS = ("pissa_init", "olora_init", "corda_init", "orthogonal_init", "lora_ga_init")


class Dora4bitVariant(DoraLinearVariant):
    """DoRA (Liu et al. 2024) that computes its norms without the dense weight or a k x k identity.

    For each row, ``|W + sBA|² = |W|² + 2s B·(W Aᵀ) + s² B·(B A Aᵀ)``: |W|² is computed once, and W Aᵀ is a forward of
    r tokens.
    """

    @staticmethod
    def init(module: "LoraLinear4bit", adapter_name: str, **kwargs: Any) -> None:
        with module.dense_base(changes=False):
            DoraLinearVariant.init(module, adapter_name, **kwargs)

    @staticmethod
    def scale_of(module: "LoraLinear4bit", adapter_name: str) -> Tensor:
        """magnitude / norm [out]; the gradient treats the norm as a constant (Liu et al. 2024, section 4.3)."""
        with torch.no_grad():
            a, b = module.lora_A[adapter_name].weight.float(), module.lora_B[adapter_name].weight.float()
            scaling = module.scaling[adapter_name]
            cross = (b * module.base_product(a).t()).sum(1)
            own = ((b @ (a @ a.t())) * b).sum(1)
            norm = (module.base_row_squares() + 2 * scaling * cross + scaling**2 * own).clamp(min=0).sqrt()
        return module.lora_magnitude_vector[adapter_name].weight / norm

    @staticmethod
    def forward(module: "LoraLinear4bit", active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        # `result` is the base's output. As in PEFT, dropout on the adapter's input also applies to the base's product
        # that is scaled.
        dropout = module.lora_dropout[active_adapter]
        dropped = dropout(x) if module.training and not isinstance(dropout, nn.Identity) else x
        scale = Dora4bitVariant.scale_of(module, active_adapter)
        fused = module.run_adapter(dropped, active_adapter, bias=False)
        plain = module.base_product(dropped) if dropped is not x else _without_bias(result, module)
        return result + scale.to(x.dtype) * fused - plain


def _without_bias(result: Tensor, module: "LoraLinear4bit") -> Tensor:
    bias = module.base_layer.bias
    return result if bias is None else result - bias


class LoraLinear4bit(PeftLinear):
    """PEFT's LoRA layer on a :class:`qlora.nn.Linear4bit`, as one fused operation.

    It fuses plain LoRA, with dropout (the first of several active adapters); DoRA; and batches with one adapter per
    sample (``adapter_names``), through ``forward.multi``. PEFT's own code computes everything else.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        self._row_squares: Tensor | None = None
        self._unmerged: list[Linear4bit] = []  # the 4-bit base while merged; in a list so that it is not a submodule
        self.merge_into = MergeInto()
        self.merge_report: MergeReport | None = None
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False
        if not config.inference_mode:
            base = self.quantized
            hint_slow_bfloat16(base.compute_dtype or base.original_dtype, base.weight.device)

    @property
    def lora_variants(self) -> dict:
        return {
            (): None,
            ("use_dora",): Dora4bitVariant,
            ("alora_invocation_tokens",): ALoraLinearVariant,
        }

    # ---- forward ----

    @property
    def quantized(self) -> Linear4bit:
        """The 4-bit base layer, also while an adapter is merged."""
        return self._unmerged[0] if self._unmerged else self.get_base_layer()

    def base_product(self, x: Tensor) -> Tensor:
        """x Wᵀ with the 4-bit W, without the bias."""
        return self.quantized.run(x, with_bias=False)

    def base_row_squares(self) -> Tensor:
        """The squared norm of each row of W: float32 [out], computed once."""
        if self._row_squares is None or self._row_squares.device != self.quantized.weight.device:
            self._row_squares = self.quantized.dequantize(torch.float32).square().sum(1)
        return self._row_squares

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._row_squares = None  # loading may change the base
        super()._load_from_state_dict(*args, **kwargs)

    def run_adapter(self, x: Tensor, name: str, bias: bool = True, lora_x: Tensor | None = None) -> Tensor:
        """The base and one adapter in one fused operation."""
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        return self.quantized.run(x, a, b, scaling, lora_x, bias)

    def fused_product(self) -> Product | None:
        """The one fused operation that :meth:`forward` is, for a group of layers with one input; None if it is not."""
        if self.disable_adapters or self.merged:
            return None
        parts = self._modules
        base = parts["base_layer"]
        all_a, all_b, all_dropout = (parts[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
        active = [name for name in self.active_adapters if name in all_a]
        if not isinstance(base, Linear4bit) or len(active) > 1 or has_hooks(base):
            return None
        if not active:
            return base.fused_product()
        name = active[0]
        a, b, dropout = all_a[name], all_b[name], all_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity)
        if drops or name in self.lora_variant or self.lora_bias[name] or has_hooks(a, b, dropout):
            return None
        return Product(base, a.weight, b.weight, self.scaling[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not args and not kwargs:
            shared = shared_result(self, x)
            if shared is not None:
                return shared
        if self.disable_adapters or self.merged or kwargs:
            return super().forward(x, *args, **kwargs)
        # Reads the dictionaries directly: nn.Module and PEFT need 10 µs per call to find these parts.
        parts = self._modules
        base = parts["base_layer"]
        all_a, all_b, all_dropout = (parts[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
        active = [name for name in self.active_adapters if name in all_a]
        if not active:
            return base(x)
        for name in active:
            if name in self.lora_variant or self.lora_bias[name]:
                return super().forward(x, *args, **kwargs)
            if has_hooks(base, all_a[name], all_b[name], all_dropout[name]):
                return super().forward(x, *args, **kwargs)  # calls each part, so its hooks run
        quantized = base if isinstance(base, Linear4bit) else self.quantized
        y: Any = None
        for name in active:
            a, b = all_a[name], all_b[name]
            dropped = self._dropped(x, all_dropout[name])
            if y is None:
                y = quantized.run(x, a.weight, b.weight, self.scaling[name], dropped)
                continue  # only the first adapter is fused with the base
            low_rank = b(a((x if dropped is None else dropped).to(a.weight.dtype)))
            y = y + (low_rank * self.scaling[name]).to(y.dtype)
        return y

    def _parts(self) -> tuple[nn.ModuleDict, ...]:
        return self.lora_A, self.lora_B, self.lora_dropout

    def _dropped(self, x: Tensor, dropout: nn.Module) -> Tensor | None:
        return dropout(x) if self.training and not isinstance(dropout, nn.Identity) else None

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        used = sorted({name for name in adapter_names if name in self.lora_A})
        if not used:
            return self.base_layer(x)
        special = any(name in self.lora_variant or self.lora_bias[name] for name in used)
        special = special or has_hooks(self.base_layer, *(part[name] for part in self._parts() for name in used))
        if special or any(self._dropped(x[:0], self.lora_dropout[name]) is not None for name in used):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        rank = max(self.r[name] for name in used)
        dtype = self.lora_A[used[0]].weight.dtype

        def padded(name: str) -> tuple[Tensor, Tensor]:
            missing = rank - self.r[name]
            a, b = self.lora_A[name].weight.to(dtype), self.lora_B[name].weight.to(dtype)
            return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))

        a, b = (torch.stack(factors) for factors in zip(*map(padded, used), strict=True))
        scaling = torch.tensor([self.scaling[name] for name in used], device=x.device)
        of_sample = torch.tensor([used.index(name) if name in used else -1 for name in adapter_names], device=x.device)
        of_row = of_sample.repeat_interleave(x.numel() // x.shape[-1] // len(adapter_names))
        base = self.quantized
        w = base.quantized_weight
        compute = base.compute_dtype or x.dtype
        y = ops.forward_multi(x.to(compute), *w.arguments, a, b, scaling, of_row, base.bias)
        return y.to(x.dtype)

    # ---- initializations that read or change the base ----

    @contextmanager
    def dense_base(self, changes: bool = True) -> Iterator[nn.Linear]:
        """Makes the base a dense float32 layer inside a ``with`` block, then quantizes it again if it ``changes``."""
        base = self.quantized
        dense = dense_linear(base.dequantize(torch.float32), base.bias)
        self.base_layer = dense
        try:
            yield dense
        finally:
            self.base_layer = base
        if changes:
            base.adopt(requantize(dense.weight.data, base.quantized_weight))
            self._row_squares = None

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        raise ValueError(
            "init_lora_weights='loftq' needs the weights before quantization: create the adapter without it"
            " and call qlora.integrations.peft.initialize_loftq(model, weights=…)"
        )

    # ---- merging ----

    @torch.no_grad()
    def exact_weight(self, names: Sequence[str]) -> Tensor:
        """The sum of the base and the named adapters, added one after another, as a float32 weight."""
        weight = self.quantized.dequantize(torch.float32)
        for name in names:
            delta = low_rank_delta(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
            if isinstance(self.lora_variant.get(name), Dora4bitVariant):
                scale = Dora4bitVariant.scale_of(self, name).float().unsqueeze(1)
                weight = weight + (scale - 1) * self.quantized.dequantize(torch.float32) + scale * delta
            elif name in self.lora_variant:
                raise ValueError(f"adapter '{name}' is a {type(self.lora_variant[name]).__name__}: it cannot be merged")
            else:
                weight = weight + delta
        return weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges into a dense layer with the base's dtype before quantization, or into the format ``merge_into``.

        The 4-bit base is kept, so :meth:`unmerge` is exact.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.lora_A]
        if not names:
            return
        base = self.quantized
        all_names = [*self.merged_adapters, *names]
        exact = self.exact_weight(all_names)
        if safe_merge and not exact.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        bias = base.bias
        for name in all_names:
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base has no bias.")
                bias = bias + self.lora_B[name].bias * self.scaling[name]
        weight, self.merge_report = merged_weight(exact, base.quantized_weight, self.merge_into, "+".join(all_names))
        self._unmerged = [base]
        self.base_layer = base.twin(weight, bias)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the 4-bit base, bit for bit."""
        if not self._unmerged:
            return
        base = self._unmerged[0].to(self.base_layer.weight.device)
        self._unmerged, self.merge_report = [], None
        self.base_layer = base
        self.merged_adapters.clear()


def _on_dense_base(name: str) -> Any:
    def init(self: LoraLinear4bit, *args: Any) -> None:
        with self.dense_base(changes=name != "orthogonal_init"):
            getattr(super(LoraLinear4bit, self), name)(*args)

    init.__name__ = name
    init.__doc__ = f"PEFT's {name}, on the dequantized base, which is quantized again if it has changed."
    return init


for _name in _DENSE_INITS:
    setattr(LoraLinear4bit, _name, _on_dense_base(_name))


class LoraEmbedding4bit(PeftEmbedding):
    """PEFT's LoRA layer on a :class:`qlora.nn.Embedding4bit`. Merging yields a dense embedding; unmerging is exact."""

    base_layer: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        self._unmerged: list[Embedding4bit] = []
        if config.use_dora:
            raise ValueError("DoRA on a 4-bit embedding is not supported: use LoRA for it, or a dense embedding")
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        names = [n for n in check_adapters_to_merge(self, adapter_names) or [] if n in self.lora_embedding_A]
        if not names:
            return
        base = self._unmerged[0] if self._unmerged else self.base_layer
        weight = base.dequantize(torch.float32)
        for name in [*self.merged_adapters, *names]:
            weight = weight + self.get_delta_weight(name).float()
        if safe_merge and not weight.isfinite().all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        self._unmerged = [base]
        self.base_layer = base.dense_twin(weight.to(base.original_dtype))
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        if self._unmerged:
            self.base_layer = self._unmerged[0].to(self.base_layer.weight.device)
            self._unmerged = []
            self.merged_adapters.clear()


class ParamWrapper(PeftParamWrapper):
    """PEFT's LoRA on one 3-D weight of :class:`qlora.nn.Experts4bit` (``target_parameters``), one adapter per expert.

    Each expert's adapter is fused with its projection; PEFT's own wrapper would add a dense delta of all experts in
    every call. PEFT finds its wrappers by class name, so this class has the same name.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if config.use_dora:
            raise ValueError(
                f"{kwargs.get('parameter_name', 'experts')}: DoRA on 4-bit experts is not supported: use LoRA for them"
                " (use_dora=False), or leave them out of target_parameters"
            )
        self.merge_into = MergeInto()
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        experts = self.get_base_layer()
        self.num_experts, n, half_k = self.get_param().shape
        self._param_ndim = 3
        return (2 * half_k, n) if experts.is_transposed else (n, 2 * half_k)  # as in the dense weight; see PEFT

    def factors(self, name: str) -> tuple[Tensor, Tensor, float]:
        """lora_a [experts, r, in] and lora_b [experts, out, r] of an adapter, and its scaling."""
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        # PEFT's weight is [out, r * experts]. As a transposed matrix its gradient takes a quarter of the time that it
        # takes with three permuted dimensions.
        b = b.reshape(-1, self.num_experts).t().unflatten(1, (b.shape[0], -1))
        return a.reshape(self.num_experts, -1, a.shape[-1]), b, self.scaling[name]

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        active = [name for name in active_adapters if name in self.lora_A]
        if not active:
            yield
            return
        every = [self.factors(name) for name in active]
        if len(every) == 1:
            together = every[0]
        else:  # concatenated adapters act as one whose rank is the sum of theirs
            a = torch.cat([scaling * a for a, _, scaling in every], dim=1)
            together = (a, torch.cat([b for _, b, _ in every], dim=2), 1.0)
        low_rank = self.get_base_layer().low_rank
        a, b, scaling = together
        low_rank[self.parameter_name] = (a, b, scaling)
        try:
            yield
        finally:
            del low_rank[self.parameter_name]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            f"{self.parameter_name}: only merge_and_unload() can merge an adapter on 4-bit experts, because it creates"
            " new experts"
        )

    @torch.no_grad()
    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        experts = self.get_base_layer()
        if not merge:
            return experts
        wrappers, layer = [], self
        while isinstance(layer, LoraExperts4bit):  # nested wrappers, one per weight
            wrappers.append(layer)
            layer = layer.base_layer
        dense = experts.to_experts(torch.float32)
        for wrapper in wrappers:
            for name in adapter_names or wrapper.active_adapters:
                if name in wrapper.lora_A:
                    a, b, scaling = wrapper.factors(name)
                    delta = low_rank_delta(a, b, scaling)
                    weight = getattr(dense, wrapper.parameter_name)
                    weight += delta.transpose(1, 2) if experts.is_transposed else delta
                    if safe_merge and not weight.isfinite().all():
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if self.merge_into.requantize:
            merged = type(experts).from_experts(dense, experts.quant_type, experts.double_quant, experts.block_size)
            merged.original_dtype = experts.original_dtype
            return merged
        for name in experts.weight_names:
            weight = getattr(dense, name)
            weight.data = weight.data.to(self.merge_into.dtype or experts.original_dtype)
        return dense


LoraExperts4bit = ParamWrapper
