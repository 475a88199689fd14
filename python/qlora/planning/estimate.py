"""Estimates the memory of a training step by kind, on each device."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from qlora import _C
from qlora.adapters.lora import linear_targets
from qlora.distributed import largest_list
from qlora.models.chunked_loss import backbone_of, chunked_loss
from qlora.nn import Experts4bit, Linear4bit, QLoRALinear
from qlora.nn.experts4bit import holds_experts
from qlora.nn.packed import STATISTICS
from qlora.nn.replacing import head_names, replace_module, shared_names, tensor_bytes
from qlora.ops import FLOAT_DTYPES
from qlora.planning.simulate import peak_of_a_step


@dataclass(frozen=True)
class Settings:
    """Settings that determine, with the model's config, the memory of a training step."""

    rank: int = 16
    adapt_experts: bool = False  # also an adapter for each expert of a mixture
    batch: int = 1  # sequences on each device
    sequence: int = 512  # tokens per sequence
    checkpointing: bool = True  # recompute each block's activations in the backward
    optimizer_bits: int = 32
    paged: bool = False  # optimizer state is outside the device's memory
    quant_type: str = "nf4"
    double_quant: bool = True
    block_size: int = 64
    dtype: str = "bfloat16"  # of activations and of tensors that stay dense
    adapter_dtype: str = "float32"
    offload_experts: bool = False  # experts stay on the host, and two of their weights are on the device at a time
    devices: int = 1  # number of devices that share the parameters with FSDP2

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "sequence", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.optimizer_bits not in (32, 8):
            raise ValueError(f"optimizer_bits={self.optimizer_bits} must be 32 or 8")


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    settings: Settings
    packed: int  # 4-bit codes
    statistics: int  # their scales
    dense: int  # embeddings, head, norms
    adapters: int
    gradients: int
    optimizer: int
    activations: int  # at the peak of forward and backward, without gradients
    workspace: int  # of one layer's kernel; with several devices also gathered parameters

    @property
    def resident(self) -> int:
        """Bytes that must fit in the device's memory."""
        parts = self.packed + self.statistics + self.dense + self.adapters + self.gradients
        optimizer = 0 if self.settings.paged else self.optimizer
        return parts + optimizer + self.activations + self.workspace

    def parts(self) -> dict[str, int]:
        """Bytes by kind, in drawing order."""
        fields = asdict(self)
        del fields["settings"]
        return fields


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype='{name}' must be float32, bfloat16 or float16")
    return dtype


def build(config: Any, settings: Settings) -> nn.Module:
    """The prepared model on the meta device, as ``prepare_model`` would leave it."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(settings.dtype))
    kept = head_names(model) | shared_names(model)
    targets = linear_targets(model)
    for name, module in list(model.named_modules()):
        if holds_experts(module):
            experts = Experts4bit.from_experts(module, settings.quant_type, settings.double_quant, settings.block_size)
            if settings.adapt_experts:
                _adapt(experts, settings)
            replace_module(model, module, experts)
            continue
        if type(module) is nn.Linear and name not in kept:
            base = Linear4bit.from_linear(module, settings.quant_type, settings.double_quant, settings.block_size)
            adapted = targets == "all-linear" or name.rpartition(".")[2] in targets
            layer = QLoRALinear(base, settings.rank, adapter_dtype=_dtype(settings.adapter_dtype)) if adapted else base
            replace_module(model, module, layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.endswith(("_lora_a", "_lora_b")))
    if settings.checkpointing:
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        switch({"use_reentrant": False})
    return model.train()


def _adapt(experts: Experts4bit, settings: Settings) -> None:
    """Gives experts on the meta device the adapters that PEFT would give them."""
    shapes = {name: getattr(experts, name).shape for name in experts.weight_names}
    dtype = _dtype(settings.adapter_dtype)
    for name, (count, n, half_k) in shapes.items():  # in PEFT's layout
        for factor, shape in (("lora_a", (count * settings.rank, 2 * half_k)), ("lora_b", (n, settings.rank * count))):
            experts.register_parameter(f"{name}_{factor}", nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")))

    def use(module: Any, _: Any) -> None:
        for name, (count, n, half_k) in shapes.items():
            a, b = getattr(module, f"{name}_lora_a"), getattr(module, f"{name}_lora_b")
            b = b.reshape(-1, count).t().unflatten(1, (n, -1))
            module.low_rank[name] = (a.view(count, -1, 2 * half_k), b, 1.0)

    experts.register_forward_pre_hook(use)


@dataclass(frozen=True)
class _Traced:
    """Figures of a model and its training step that do not depend on the optimizer or the number of devices."""

    packed: int
    statistics: int
    dense: int
    adapters: int
    trained: tuple[int, ...]  # elements of each trained parameter
    activations: int
    widest: int  # features
    largest: int  # elements of a 4-bit weight
    block: int  # bytes of the largest repeated block
    experts: int  # of a mixture's layer; 0: no mixture
    experts_out: int  # features of their widest product
    packed_experts: tuple[int, ...]  # bytes of their weights, in the order of the layers


def _packed_weights(layer: Linear4bit | Experts4bit) -> list[torch.Tensor]:
    names = layer.weight_names if isinstance(layer, Experts4bit) else ["weight"]
    return [getattr(layer, name) for name in names]


def _product_shape(packed: torch.Tensor) -> tuple[int, int]:
    """(n, k) of a packed weight, or of one expert."""
    return packed.shape[-2], 2 * packed.shape[-1]


_TRACES: dict[tuple[Any, ...], _Traced] = {}  # plans that differ only in the optimizer share an entry


def _chunked(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss as a training run computes it, on all tokens: in chunks, or with all logits if chunks are impossible."""
    if backbone_of(model) is None:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    positions = torch.arange(ids.numel(), dtype=torch.long).view_as(ids)[:, 1:].flatten()
    return chunked_loss(model, ids, positions, ids.numel(), input_ids=ids)


def _trace(config: Any, settings: Settings) -> _Traced:
    same = {name: None for name in ("optimizer_bits", "paged", "devices", "offload_experts")}
    key = (config.to_json_string(), *(asdict(settings) | same).items())
    if key not in _TRACES:
        model = build(config, settings)
        bases = [module for module in model.modules() if isinstance(module, Linear4bit | Experts4bit)]
        packed = sum(weight.nbytes for base in bases for weight in _packed_weights(base))
        statistics = sum(
            buffer.nbytes
            for base in bases
            for name, buffer in base.named_buffers(recurse=False)
            if name.endswith(STATISTICS)
        )
        shapes = [_product_shape(weight) for base in bases for weight in _packed_weights(base)]
        trained = [p for p in model.parameters() if p.requires_grad]
        adapters = sum(p.nbytes for p in trained)
        parameters = tensor_bytes(model)
        _TRACES[key] = _Traced(
            packed=packed,
            statistics=statistics,
            dense=parameters - packed - statistics - adapters,
            adapters=adapters,
            trained=tuple(p.numel() for p in trained),
            widest=max(max(shape) for shape in shapes),
            largest=max(n * k for n, k in shapes),
            experts=max((base.num_experts for base in bases if isinstance(base, Experts4bit)), default=0),
            packed_experts=tuple(
                w.nbytes for base in bases if isinstance(base, Experts4bit) for w in _packed_weights(base)
            ),
            experts_out=max(
                (w.shape[1] for b in bases if isinstance(b, Experts4bit) for w in _packed_weights(b)), default=0
            ),
            block=max((sum(p.nbytes for p in child.parameters()) for child in largest_list(model)), default=0),
            activations=max(
                0, peak_of_a_step(model, settings.batch, settings.sequence, _chunked) - parameters - adapters
            ),
        )
    return _TRACES[key]


def choices(config: Any) -> int | None:
    """The number of experts that a mixture's router chooses for each token; None if the config does not say."""
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts")
    text = config.get_text_config()
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)


def experts_note(config: Any, settings: Settings) -> str | None:
    """How a mixture distributes the tokens of a step over its experts; None for other models."""
    experts = _trace(config, settings).experts
    of_token = choices(config)
    if experts == 0 or of_token is None:
        return None
    tokens = settings.batch * settings.sequence
    average = tokens * of_token / experts
    return (
        f"{experts} experts, {of_token} for each token: of {tokens} tokens an expert gets {average:g} on average and"
        f" {tokens} at most. Both need the same memory."
    )


def _optimizer_bytes(elements: tuple[int, ...], bits: int) -> int:
    def moments(count: int) -> int:
        if bits == 8 and count >= 4096:  # PagedAdamW's min_8bit_size
            return 2 * count + 8 * -(-count // _C.MOMENT_BLOCK)
        return 8 * count

    return sum(map(moments, elements))


def estimate(config: Any, settings: Settings) -> Estimate:
    """Bytes of a training step on each device, for the model of ``config``.

    A mixture's memory does not depend on how its router distributes tokens: every buffer holds the rows of all experts
    together, tokens times experts per token.
    """
    traced = _trace(config, settings)
    for option in ("adapt_experts", "offload_experts"):
        if getattr(settings, option) and traced.experts == 0:
            raise ValueError(f"{option}: {type(config).__name__} is no mixture whose experts become 4-bit")
    tokens = settings.batch * settings.sequence
    size = _dtype(settings.dtype).itemsize
    # A kernel's packed copy of the tokens, and the panel that a GPU dequantizes at a time (csrc/cuda/select.h).
    at_once = max(tokens, min(tokens * (choices(config) or 1), _C.EXPERT_ROWS)) if traced.experts else tokens
    workspace = at_once * traced.widest * size + min(_C.GPU_PANEL_BYTES, traced.largest * size)
    if settings.adapt_experts:  # the kernels' copy of lora_b
        workspace += traced.experts * traced.experts_out * settings.rank * _dtype(settings.adapter_dtype).itemsize
    packed = traced.packed
    if settings.offload_experts:
        packed -= sum(traced.packed_experts)
        workspace += max((a + b for a, b in pairwise(traced.packed_experts)), default=0)
    n = settings.devices
    if n > 1:  # the running block and the next one are gathered
        workspace += 2 * traced.block
    return Estimate(
        settings,
        packed=-(-packed // n),
        statistics=traced.statistics,
        dense=-(-traced.dense // n),
        adapters=-(-traced.adapters // n),
        gradients=-(-traced.adapters // n),
        optimizer=-(-_optimizer_bytes(traced.trained, settings.optimizer_bits) // n),
        activations=traced.activations,
        workspace=workspace,
    )
