"""Estimates the memory of a training step by kind, on each device."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qlora import _C
from qlora.distributed import largest_list
from qlora.models.chunked_loss import backbone_of, chunked_loss
from qlora.nn import Linear4bit, QLoRALinear
from qlora.nn.experts4bit import holds_experts
from qlora.nn.replacing import head_names, replace_module, shared_names, tensor_bytes
from qlora.ops import FLOAT_DTYPES
from qlora.planning.simulate import peak_of_a_step


@dataclass(frozen=True)
class Settings:
    """Settings that determine, with the model's config, the memory of a training step."""

    rank: int = 16
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
    for name, module in list(model.named_modules()):
        if holds_experts(module):
            raise ValueError(f"{name} holds experts: their memory depends on the data and cannot be planned")
        if type(module) is nn.Linear and name not in kept:
            base = Linear4bit.from_linear(module, settings.quant_type, settings.double_quant, settings.block_size)
            layer = QLoRALinear(base, settings.rank, adapter_dtype=_dtype(settings.adapter_dtype))
            replace_module(model, module, layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if settings.checkpointing:
        switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        switch({"use_reentrant": False})
    return model.train()


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


_TRACES: dict[tuple[Any, ...], _Traced] = {}  # plans that differ only in the optimizer share an entry


def _chunked(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss as a training run computes it, on all tokens: in chunks, or with all logits if chunks are impossible."""
    if backbone_of(model) is None:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    positions = torch.arange(ids.numel(), dtype=torch.long).view_as(ids)[:, 1:].flatten()
    return chunked_loss(model, ids, positions, ids.numel(), input_ids=ids)


def _trace(config: Any, settings: Settings) -> _Traced:
    same = {name: None for name in ("optimizer_bits", "paged", "devices")}
    key = (config.to_json_string(), *(asdict(settings) | same).items())
    if key not in _TRACES:
        model = build(config, settings)
        bases = [module for module in model.modules() if isinstance(module, Linear4bit)]
        packed = sum(base.weight.nbytes for base in bases)
        statistics = sum(sum(buffer.nbytes for buffer in base.buffers(recurse=False)) for base in bases)
        trained = [p for p in model.parameters() if p.requires_grad]
        adapters = sum(p.nbytes for p in trained)
        parameters = tensor_bytes(model)
        _TRACES[key] = _Traced(
            packed=packed,
            statistics=statistics,
            dense=parameters - packed - statistics - adapters,
            adapters=adapters,
            trained=tuple(p.numel() for p in trained),
            widest=max(max(base.in_features, base.out_features) for base in bases),
            largest=max(base.in_features * base.out_features for base in bases),
            block=max((sum(p.nbytes for p in child.parameters()) for child in largest_list(model)), default=0),
            activations=max(
                0, peak_of_a_step(model, settings.batch, settings.sequence, _chunked) - parameters - adapters
            ),
        )
    return _TRACES[key]


def _optimizer_bytes(elements: tuple[int, ...], bits: int) -> int:
    def moments(count: int) -> int:
        if bits == 8 and count >= 4096:  # PagedAdamW's min_8bit_size
            return 2 * count + 8 * -(-count // _C.MOMENT_BLOCK)
        return 8 * count

    return sum(map(moments, elements))


def estimate(config: Any, settings: Settings) -> Estimate:
    """Bytes of a training step on each device, for the model of ``config``.

    Raises ValueError for models with experts, whose memory depends on the data.
    """
    traced = _trace(config, settings)
    tokens = settings.batch * settings.sequence
    size = _dtype(settings.dtype).itemsize
    # A kernel's packed copy of the tokens, and the panel that a GPU dequantizes at a time (csrc/cuda/select.h).
    workspace = tokens * traced.widest * size + min(_C.GPU_PANEL_BYTES, traced.largest * size)
    n = settings.devices
    if n > 1:  # the running block and the next one are gathered
        workspace += 2 * traced.block
    return Estimate(
        settings,
        packed=-(-traced.packed // n),
        statistics=traced.statistics,
        dense=-(-traced.dense // n),
        adapters=-(-traced.adapters // n),
        gradients=-(-traced.adapters // n),
        optimizer=-(-_optimizer_bytes(traced.trained, settings.optimizer_bits) // n),
        activations=traced.activations,
        workspace=workspace,
    )
