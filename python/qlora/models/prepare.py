"""prepare_model: turns the linear layers of any ``nn.Module`` into 4-bit layers with adapters, one at a time."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapters.files import forbid_saving
from qlora.devices import hint_slow_bfloat16
from qlora.distributed import refuse_fsdp1
from qlora.nn import Experts4bit, Linear4bit, QLoRALinear
from qlora.nn.borrowing import borrowed
from qlora.nn.experts4bit import holds_experts, why_not_experts
from qlora.nn.finding import is_inside
from qlora.nn.qlora_linear import check_adapter
from qlora.nn.replacing import head_names, replace_module, shared_names, tensor_bytes, why_not_plain
from qlora.ops import check_format
from qlora.storage.weights import WeightSource, is_meta

logger = logging.getLogger(__name__)

# The first name is of transformers 6 and later, the second of earlier versions.
_CHECKPOINTING_SWITCHES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


@dataclass(frozen=True)
class PreparedReport:
    """Result of :func:`prepare_model`."""

    quantized: tuple[str, ...]  # names of the layers that are now 4-bit
    skipped: tuple[str, ...]  # names of linear layers and modules of experts that stay as they were
    bytes_before: int  # parameters and buffers of the original model; on the meta device, of its dense form
    bytes_after: int
    trainable_params: int


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # As in PEFT's target_modules, a pattern is a whole name or its last components.
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _check_options(
    model: nn.Module, rank: int | None, dropout: float, quant_type: str, block_size: int, checkpointing: bool
) -> None:
    """Raises ValueError for bad options, before the model changes."""
    check_format(quant_type, block_size)
    if rank is not None:
        check_adapter(rank, dropout)
    if checkpointing and not any(callable(getattr(model, name, None)) for name in _CHECKPOINTING_SWITCHES):
        raise ValueError(f"{type(model).__name__} has no gradient_checkpointing_enable: checkpoint its blocks yourself")


def _enable_checkpointing(model: nn.Module) -> None:
    """Enables transformers' non-reentrant checkpointing and makes the embedding's output require grad.

    A checkpointed block needs an input that requires grad; with a frozen base no other tensor before it does.
    """
    name = next(name for name in _CHECKPOINTING_SWITCHES if callable(getattr(model, name, None)))
    getattr(model, name)(**{name.replace("_enable", "_kwargs"): {"use_reentrant": False}})
    disable = getattr(model, "disable_input_require_grads", None)
    if callable(disable):
        disable()  # torch.compile cannot trace transformers' own hook
    get_embedding = getattr(model, "get_input_embeddings", None)
    first = get_embedding() if callable(get_embedding) else None
    if first is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if first is not None:
        first.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: object, output: Tensor) -> None:
    # Not inside torch.compile, which cannot return such a tensor from a graph; the non-reentrant checkpointing enabled
    # here gets its gradients without it.
    if not torch.compiler.is_compiling():
        output.requires_grad_(True)


def _left_alone(model: nn.Module, names: Sequence[str], quantize_head: bool) -> dict[str, str]:
    """Linear layers that stay as they are, each with the reason."""
    heads = {} if quantize_head else dict.fromkeys(head_names(model), "the output head")
    shared = dict.fromkeys(shared_names(model), "its weight is shared with another module")
    readers = {name: f"the code of {reader} reads its weight" for name, reader in borrowed(model, names).items()}
    own = {}
    for name in names:
        module = model.get_submodule(name)
        reason = None if isinstance(module, Linear4bit) else why_not_plain(module, nn.Linear)
        if reason is not None:
            own[name] = reason
    return {**readers, **own, **heads, **shared}


@torch.inference_mode(False)
def prepare_model(
    model: nn.Module,
    rank: int | None = 16,
    alpha: float | None = None,
    *,
    target_modules: Sequence[str] | None = None,
    skip_modules: Sequence[str] = (),
    quantize_head: bool = False,
    quant_type: str = "nf4",
    double_quant: bool = True,
    block_size: int = 64,
    dropout: float = 0.0,
    adapter_dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    weights: str | Path | dict[str, Tensor] | None = None,
    progress: bool = False,
) -> PreparedReport:
    """Freezes ``model`` and replaces its linear layers, in place, by :class:`qlora.nn.QLoRALinear`.

    It replaces PEFT's ``prepare_model_for_kbit_training`` but casts nothing: the base is frozen, no parameter changes
    its dtype, and with ``gradient_checkpointing`` the embedding's output requires grad.

    A model that was loaded in 4 bit (``QLoRAConfig``) keeps its 4-bit layers, which get adapters unless rank is None.
    3-D experts are quantized without adapters.

    Some layers stay dense and are listed in the report: the output head and heads of other tasks, layers that share
    their weight, layers that compute more than nn.Linear (own forward, parametrization, hooks), layers whose weight the
    model's code reads, and experts without transformers' interface. The log gives the reasons.

    It works layer by layer: each dense weight is freed before the next one is quantized. A model on the meta device
    reads ``weights`` one tensor at a time, so that peak memory stays near the size of the result.

    Args:
        model: any module, from transformers or not.
        rank, alpha, dropout, adapter_dtype: of the adapters, see QLoRALinear; rank=None quantizes without adapters.
        target_modules: names (whole, or last components) of the layers that get an adapter (default: all linear
            layers). The other linear layers are quantized without an adapter.
        skip_modules: names of layers to leave as they are.
        quantize_head: also quantize heads; a head that shares its weight is still skipped.
        weights: a safetensors file, a folder of them, or a mapping from parameter names, for models on the meta device.
        progress: show a progress bar (needs rich).

    Raises ValueError if there is no linear layer to quantize, if a name in target_modules or skip_modules matches
    nothing, or if the model is on the meta device without ``weights``; KeyError for parameters that ``weights`` lacks.
    """
    refuse_fsdp1()
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear layer, which cannot be replaced in place: use QLoRALinear(model, rank)"
        )
    linear_names = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not is_inside(model, name)
    ]
    # A model with 4-bit layers was quantized when it was loaded, so its dense layers are dense on purpose.
    packed = {name for name in linear_names if isinstance(model.get_submodule(name), Linear4bit)}
    if not linear_names:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize")
    for label, patterns in (("target_modules", target_modules or ()), ("skip_modules", skip_modules)):
        if isinstance(patterns, str):
            raise ValueError(f"{label}='{patterns}' must be a list of names: ['{patterns}']")
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in linear_names):
                raise ValueError(f"{label}: '{pattern}' matches no linear layer, e.g. '{linear_names[0]}'")
    _check_options(model, rank, dropout, quant_type, block_size, gradient_checkpointing)
    reasons = _left_alone(model, linear_names, quantize_head)
    if packed:
        reasons = dict.fromkeys(set(linear_names) - packed, "the model came with other layers in 4 bit")
    reasons |= {n: "it is in skip_modules" for n in linear_names if _matches(n, skip_modules)}
    skipped = [n for n in linear_names if n in reasons]
    chosen = [n for n in linear_names if n not in reasons]
    if not chosen:
        raise ValueError(f"all linear layers were skipped: {reasons}")
    wanted = [n for n in skipped if target_modules is not None and _matches(n, target_modules)]
    if wanted:
        raise ValueError(f"target_modules: {wanted[0]} cannot have an adapter: {reasons[wanted[0]]}")
    experts = []
    for name, module in model.named_modules():
        if holds_experts(module) and not isinstance(module, Experts4bit):
            reason = "the model came with other layers in 4 bit" if packed else why_not_experts(module)
            if reason is None:
                experts.append(name)
            else:
                skipped.append(name)
                reasons[name] = reason

    source = WeightSource(weights) if weights is not None else None
    if source is None and any(is_meta(t) for t in model.parameters()):
        raise ValueError("the model is on the meta device: pass weights=, a safetensors file, folder or mapping")
    bytes_before = tensor_bytes(model)
    model.requires_grad_(False)

    def replace(name: str) -> None:
        linear = model.get_submodule(name)
        if name in experts:
            if source is not None:
                source.fill(linear, name, copy=False)
            replace_module(model, linear, Experts4bit.from_experts(linear, quant_type, double_quant, block_size))
            return
        assert isinstance(linear, nn.Linear)
        if source is not None:
            source.fill(linear, name, copy=False)
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.clone()  # the new layer keeps it, so it must not stay mapped
        layer: nn.Module
        if isinstance(linear, Linear4bit) and (
            rank is None or (target_modules is not None and not _matches(name, target_modules))
        ):
            return
        if rank is None or (target_modules is not None and not _matches(name, target_modules)):
            layer = Linear4bit.from_linear(linear, quant_type, double_quant, block_size)
        else:
            layer = QLoRALinear(
                linear,
                rank,
                alpha,
                quant_type=quant_type,
                double_quant=double_quant,
                block_size=block_size,
                dropout=dropout,
                adapter_dtype=adapter_dtype,
            )
        layer.train(linear.training)
        replace_module(model, linear, layer)

    for name in _with_progress([*chosen, *experts], "Quantizing", progress):
        try:
            replace(name)
        except RuntimeError as error:  # nan or inf: adds the layer's name
            raise ValueError(f"{name}: {error}") from error
    if source is not None:
        source.fill_rest(model)
    if gradient_checkpointing:
        _enable_checkpointing(model)
    if rank is not None:
        first = model.get_submodule(chosen[0])
        if isinstance(first, QLoRALinear) and isinstance(first.base, Linear4bit):
            base = first.base
            hint_slow_bfloat16(base.compute_dtype or base.original_dtype, base.weight.device)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("quantized %d layers, left %s", len(chosen) + len(experts), reasons)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or rank is not None:
        forbid_saving(model)
    if quantizer is not None and rank is not None:
        quantizer.has_adapters = True
    return PreparedReport((*chosen, *experts), tuple(skipped), bytes_before, tensor_bytes(model), trainable)


def _with_progress(names: Sequence[str], label: str, show: bool) -> Iterator[str]:
    if not show:
        yield from names
        return
    from rich.progress import track

    yield from track(names, description=label)
