"""Experts4bit: frozen 4-bit experts of a mixture-of-experts layer, whose weights are 3-D parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from qlora import ops
from qlora.nn.packed import STATISTICS, restore_dtypes
from qlora.nn.replacing import has_hooks
from qlora.weight import QuantizedWeight, quantize

WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
# Attributes that transformers' use_experts_implementation sets on such a module.
_CONTRACT = ("has_gate", "has_bias", "is_transposed")


def why_not_experts(module: nn.Module) -> str | None:
    """Why :class:`Experts4bit` cannot replace ``module``, a module of experts; None if it can."""
    missing = [name for name in (*_CONTRACT, "num_experts", "_apply_gate") if not hasattr(module, name)]
    if missing:
        return f"it does not declare the layout of its experts (no attribute {missing[0]})"
    if has_hooks(module):
        return "it has hooks, or a forward set on the instance, that would be lost: remove them first"
    if getattr(module, "has_post_expert_norm", False):
        return "it normalizes the output of each expert"
    for name in expert_weights(module):
        if getattr(module, name).shape[1 if module.is_transposed else 2] % 2 != 0:
            return f"the reduction dimension of {name} is odd"
    return None


def holds_experts(module: nn.Module) -> bool:
    """Whether a module has expert weights as 3-D parameters."""
    return bool(expert_weights(module))


def expert_weights(module: nn.Module) -> list[str]:
    """Names of the 3-D expert weights of a module; empty if it has none."""
    parameters = module._parameters
    return [name for name in WEIGHTS if getattr(parameters.get(name), "ndim", 0) == 3]


def copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the settings, modules, buffers and parameters of ``source``, except for the expert weights."""
    private = set(vars(nn.Module()))
    private |= {"low_rank", "stage"}
    vars(target).update({name: value for name, value in vars(source).items() if name not in private})
    skipped = getattr(source, "weight_names", expert_weights(source))
    statistics = {f"{name}_{statistic}" for name in skipped for statistic in STATISTICS}
    for name, parameter in source._parameters.items():
        if name not in skipped:
            target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        if name not in statistics:
            target.register_buffer(name, buffer, name not in source._non_persistent_buffers_set)
    for name, module in source._modules.items():
        target.add_module(name, module)


def _weighted_sum(hidden: Tensor, weights: Tensor) -> Tensor:
    """The sum over each token's choices: hidden [tokens, choices, out], weights [tokens, choices]; summed in float32.

    A product of small matrices takes a quarter of the time of a scaled copy of ``hidden`` and its sum. If the router's
    weights have a dtype of their own (float32), it would have to round them.
    """
    if weights.dtype != hidden.dtype:
        return (hidden * weights.unsqueeze(-1)).sum(1)
    return torch.bmm(weights.unsqueeze(1), hidden).squeeze(1)


class Experts4bit(nn.Module):
    """Experts that compute ``act(gate) * up`` and a down projection, with 4-bit weights.

    :meth:`from_experts` makes it from a module with transformers' experts interface, and keeps that module's attributes
    and gate. The weight ``gate_up_proj`` is a frozen uint8 parameter (experts, out, in / 2). Its statistics are buffers
    ``gate_up_proj_absmax``, ``…_nested_absmax`` and ``…_nested_offset`` with one row per expert, so that each expert is
    a separate 4-bit weight. Weights that the module stores transposed are also quantized along their reduction.
    """

    experts_class: Any
    weight_names: list[str]
    act_fn: Any
    quant_type: str
    block_size: int
    double_quant: bool
    original_dtype: torch.dtype
    # For each weight name lora_a [experts, r, in], lora_b [experts, out, r], scaling; set while an adapter is active.
    low_rank: dict[str, tuple[Tensor, Tensor, float]]
    stage: Any = None  # qlora.nn.offload.Stage if the weights stay on the host
    num_experts: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool

    @classmethod
    @torch.inference_mode(False)
    def from_experts(
        cls, experts: nn.Module, quant_type: str = "nf4", double_quant: bool = True, block_size: int = 64
    ) -> "Experts4bit":
        """Quantizes the weights of ``experts``; its other parameters are shared and frozen. Meta tensors stay meta.

        Raises ValueError for a module that this class cannot replace.
        """
        reason = why_not_experts(experts)
        if reason is not None:
            raise ValueError(f"{type(experts).__name__} cannot be quantized: {reason}")
        layer = cls()
        copy_attributes(experts, layer)
        layer.low_rank = {}
        layer.experts_class = type(experts)
        layer.quant_type, layer.block_size, layer.double_quant = quant_type, block_size, double_quant
        layer.weight_names = expert_weights(experts)
        layer.original_dtype = getattr(experts, layer.weight_names[0]).dtype
        for name in layer.weight_names:
            tensors = layer.quantize(getattr(experts, name).detach())
            setattr(layer, name, nn.Parameter(tensors["weight"], requires_grad=False))
            for statistic in STATISTICS:
                layer.register_buffer(f"{name}_{statistic}", tensors[statistic])
        layer.requires_grad_(False)
        layer.train(experts.training)
        return layer

    def quantize(self, dense: Tensor) -> dict[str, Tensor]:
        """Quantizes ``dense`` (experts, …): returns ``weight`` and the statistics by name, stacked over experts."""
        parts = [
            quantize(
                expert.t().contiguous() if self.is_transposed else expert,
                self.quant_type,
                self.block_size,
                self.double_quant,
            )
            for expert in dense
        ]
        n, k = parts[0].shape
        stacked = {name: torch.stack([getattr(part, name) for part in parts]) for name in STATISTICS}
        return {"weight": torch.stack([part.packed.view(n, k // 2) for part in parts]), **stacked}

    def expert(self, name: str, index: int) -> QuantizedWeight:
        """The weight of one expert, (out, in), as views."""
        absmax, nested_absmax, nested_offset = (getattr(self, f"{name}_{s}")[index] for s in STATISTICS)
        packed = getattr(self, name)[index].to(absmax.device)  # a copy if the weights stay on the host
        return QuantizedWeight(
            packed.flatten(),
            absmax,
            nested_absmax,
            nested_offset,
            (packed.shape[0], 2 * packed.shape[1]),
            self.quant_type,
            self.block_size,
            self.original_dtype,
        )

    def set_expert(self, name: str, index: int, weight: QuantizedWeight) -> None:
        """Copies ``weight``, of the same shape and format, into the weight of one expert."""
        packed = getattr(self, name)
        with torch.no_grad():  # not through .data, so that a copy of an offloaded weight is known to be old
            packed[index].copy_(weight.packed.view(packed.shape[1:]))
            for statistic in STATISTICS:
                getattr(self, f"{name}_{statistic}")[index].copy_(getattr(weight, statistic))

    def project(self, name: str, x: Tensor, expert_of_row: Tensor) -> Tensor:
        """One projection of all experts, with their adapters: x [tokens, in] to [rows, out].

        expert_of_row int64 [rows], rows being a multiple of tokens: as in :func:`qlora.ops.forward_experts`.
        """
        packed = getattr(self, name)
        absmax, *nested = (getattr(self, f"{name}_{statistic}") for statistic in STATISTICS)
        weight = (packed, absmax, nested[0], nested[1], (packed.shape[0], packed.shape[1], 2 * packed.shape[2]))
        a, b, scaling = self.low_rank.get(name, (None, None, 1.0))
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        arguments = (*weight, self.quant_type, self.block_size, expert_of_row, a, b, scaling, bias)
        if self.stage is not None and self.stage.is_needed(packed, x):
            return self.stage.project(x, *arguments)
        return ops.forward_experts(x, *arguments)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of each token's chosen experts, [tokens, out].

        hidden_states [tokens, in]; top_k_index and top_k_weights [tokens, choices] (some models call them
        router_indices and routing_weights). An index >= num_experts is an expert on another process and is skipped.
        Raises TypeError if indices or weights are missing.
        """
        index = router_indices if top_k_index is None else top_k_index
        weights = routing_weights if top_k_weights is None else top_k_weights
        if index is None or weights is None:
            raise TypeError("the experts need the router's indices and weights for each token")
        chosen = index.reshape(-1)
        hidden = self.project("gate_up_proj" if self.has_gate else "up_proj", hidden_states, chosen)
        hidden = self.experts_class._apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)
        hidden = self.project("down_proj", hidden, chosen)
        return _weighted_sum(hidden.view(*index.shape, hidden.shape[-1]), weights).to(hidden_states.dtype)

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight ``name`` of all experts, in the original module's layout."""
        dense = torch.stack([self.expert(name, i).dequantize(dtype) for i in range(self.num_experts)])
        return dense.transpose(1, 2).contiguous() if self.is_transposed else dense

    def to_experts(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The original module with dequantized weights, in ``dtype`` (default: the dtype before quantization)."""
        return self.dense_twin({name: self.dequantize(name, dtype) for name in self.weight_names})

    def dense_twin(self, weights: dict[str, Tensor]) -> nn.Module:
        """The original module with ``weights`` by name, in its layout."""
        dense: nn.Module = self.experts_class.__new__(self.experts_class)
        nn.Module.__init__(dense)
        copy_attributes(self, dense)
        for name in self.weight_names:
            dense.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))
        dense.train(self.training)
        return dense

    def _apply(self, fn: Any, recurse: bool = True) -> "Experts4bit":
        names = [f"{name}_{statistic}" for name in self.weight_names for statistic in STATISTICS]
        before = {name: self._buffers[name] for name in names}
        kept = {} if self.stage is None else {name: self._parameters.pop(name) for name in self.weight_names}
        try:
            super()._apply(fn, recurse)
        finally:  # also if a move runs out of memory
            self._parameters.update(kept)
        restore_dtypes(self, before)
        return self

    @property
    def hidden_numel(self) -> int:
        """The number of weights minus the number of elements that store them (two weights per byte)."""
        return sum(getattr(self, name).numel() for name in self.weight_names)

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.quant_type}, block_size={self.block_size}"
