"""prepare_model: turns the linear layers of any ``nn.Module`` into 4-bit layers with adapters, one at a time."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qlora.distributed import refuse_fsdp1
from qlora.models.weights import WeightSource, is_meta
from qlora.nn import Linear4bit, QLoRALinear
from qlora.nn.qlora_linear import check_adapter
from qlora.ops import check_format

logger = logging.getLogger(__name__)

_HEAD_NAMES = ("lm_head", "embed_out", "output_projection")
# transformers 6 and later, and before.
_CHECKPOINTING_SWITCHES = ("activation_checkpointing_enable", "gradient_checkpointing_enable")


@dataclass(frozen=True)
class PreparedReport:
    """What :func:`prepare_model` did."""

    quantized: tuple[str, ...]  # names of the layers that are 4-bit now
    skipped: tuple[str, ...]  # names of linear layers left alone
    bytes_before: int  # parameters and buffers of the model as it came (of its dense form on the meta device)
    bytes_after: int
    trainable_params: int


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones counted once."""
    seen = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts ``new`` wherever ``model`` holds ``old``, under every name that it has."""
    for parent in list(model.modules()):  # a list: `new` may hold `old` itself
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
                if isinstance(parent, nn.TransformerEncoderLayer):
                    parent.activation_relu_or_gelu = 0  # its fast path reads the children's weights itself


def head_and_shared_names(model: nn.Module) -> set[str]:
    """Names of linear layers that are the output head, or share their weight with another module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            owners.setdefault(id(weight), []).append(name)
    shared = {name for names in owners.values() if len(names) > 1 for name in names}
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and (module is head or name in shared or name.rpartition(".")[2] in _HEAD_NAMES)
    }


def _matches(name: str, patterns: Sequence[str]) -> bool:
    # As PEFT's target_modules: the whole name, or its last components.
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether a layer is part of an adapted one, ours or PEFT's."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, QLoRALinear) or hasattr(parent, "get_base_layer")


def _check_options(
    model: nn.Module, rank: int | None, dropout: float, quant_type: str, block_size: int, checkpointing: bool
) -> None:
    """Raises ValueError before anything of the model has changed."""
    check_format(quant_type, block_size)
    if rank is not None:
        check_adapter(rank, dropout)
    if checkpointing and not any(callable(getattr(model, name, None)) for name in _CHECKPOINTING_SWITCHES):
        raise ValueError(f"{type(model).__name__} has no gradient_checkpointing_enable: wrap its blocks yourself")


def _enable_checkpointing(model: nn.Module) -> None:
    """Switches on transformers' checkpointing, non-reentrant, and lets the embedding's output require grad: a
    checkpointed block needs an input that does, and with a frozen base nothing upstream has one."""
    name = next(name for name in _CHECKPOINTING_SWITCHES if callable(getattr(model, name, None)))
    getattr(model, name)(**{name.replace("_enable", "_kwargs"): {"use_reentrant": False}})
    disable = getattr(model, "disable_input_require_grads", None)
    if callable(disable):
        disable()  # transformers' own hook, which torch.compile cannot take into a graph
    get_embedding = getattr(model, "get_input_embeddings", None)
    first = get_embedding() if callable(get_embedding) else None
    if first is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if first is not None:
        first.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: object, output: Tensor) -> None:
    # Not inside torch.compile, which cannot return such a tensor from a graph; non-reentrant checkpointing, the kind
    # that is switched on here, has gradients without it.
    if not torch.compiler.is_compiling():
        output.requires_grad_(True)


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

    Does what PEFT's ``prepare_model_for_kbit_training`` is for, without its casts: the base is frozen, no parameter
    changes its dtype, and with ``gradient_checkpointing`` the embedding's output requires grad.

    A model that was loaded in 4 bit (``QLoRAConfig``) keeps its layers: they get adapters, or with rank=None nothing
    but the rest of the preparation. Its 3-D experts stay without adapters.

    Layer by layer: a dense weight is freed before the next one is quantized. A model on the meta device takes its
    weights from ``weights``, one tensor at a time, so that the peak stays near the size of the result.

    Args:
        model: any module; transformers models and plain ones.
        rank, alpha, dropout, adapter_dtype: of the adapters, see QLoRALinear; rank=None quantizes without adapters.
        target_modules: names (whole, or last components) of the layers that get an adapter; default: all linear layers.
            Linear layers outside are quantized without an adapter.
        skip_modules: names of layers to leave alone.
        quantize_head: include the output head; shared embeddings are still skipped.
        weights: a safetensors file, a folder of them, or a mapping from parameter names; for models on the meta device.
        progress: show a bar (needs rich).

    Raises ValueError if no layer matches, a name in target_modules or skip_modules matches nothing, or the model is on
    the meta device without ``weights``; KeyError naming parameters that ``weights`` lacks.
    """
    refuse_fsdp1()
    if isinstance(model, nn.Linear):
        raise ValueError(
            "the model is itself a linear layer, which cannot be replaced in place: use QLoRALinear(model, rank)"
        )
    linear_names = [
        name for name, m in model.named_modules() if isinstance(m, nn.Linear) and not _is_inside(model, name)
    ]
    # A model that holds 4-bit layers was quantized when it was loaded: what is dense there is meant to be.
    packed = {name for name in linear_names if isinstance(model.get_submodule(name), Linear4bit)}
    if not linear_names:
        raise ValueError(f"{type(model).__name__} has no nn.Linear to quantize")
    for label, patterns in (("target_modules", target_modules or ()), ("skip_modules", skip_modules)):
        for pattern in patterns:
            if not any(_matches(name, [pattern]) for name in linear_names):
                raise ValueError(f"{label}: '{pattern}' matches no linear layer, e.g. '{linear_names[0]}'")
    _check_options(model, rank, dropout, quant_type, block_size, gradient_checkpointing)
    kept = head_and_shared_names(model)
    if quantize_head:
        shared = {n for n in kept if any(p is model.get_submodule(n).weight for p in _other_weights(model, n))}
        kept = shared
    # nn.MultiheadAttention multiplies with the weight of this subclass itself, without calling the layer.
    kept |= {n for n in linear_names if isinstance(model.get_submodule(n), NonDynamicallyQuantizableLinear)}
    if packed:
        kept = set(linear_names) - packed
    skipped = [n for n in linear_names if n in kept or _matches(n, skip_modules)]
    chosen = [n for n in linear_names if n not in set(skipped)]
    if not chosen:
        raise ValueError(f"all linear layers were skipped: {skipped}")

    source = WeightSource(weights) if weights is not None else None
    if source is None and any(is_meta(t) for t in model.parameters()):
        raise ValueError("the model is on the meta device: pass weights=, a safetensors file, folder or mapping")
    bytes_before = tensor_bytes(model)
    model.requires_grad_(False)

    def replace(name: str) -> None:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if source is not None:
            source.fill(linear, name, copy=False)
            if linear.bias is not None:
                linear.bias.data = linear.bias.data.clone()  # the new layer keeps it: it must not stay mapped
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

    for name in _with_progress(chosen, "Quantizing", progress):
        try:
            replace(name)
        except RuntimeError as error:  # a nan or inf: say in which layer
            raise ValueError(f"{name}: {error}") from error
    if source is not None:
        source.fill_rest(model)
    if gradient_checkpointing:
        _enable_checkpointing(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("quantized %d layers, skipped %s", len(chosen), skipped)
    return PreparedReport(tuple(chosen), tuple(skipped), bytes_before, tensor_bytes(model), trainable)


def _other_weights(model: nn.Module, name: str) -> Iterator[nn.Parameter]:
    for other, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if other != name and isinstance(weight, nn.Parameter):
            yield weight


def _with_progress(names: Sequence[str], label: str, show: bool) -> Iterator[str]:
    if not show:
        yield from names
        return
    from rich.progress import track

    yield from track(names, description=label)


def bare_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """All 4-bit layers of a model without adapters, ours or PEFT's, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit) and not _is_inside(model, n)}


def qlora_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """All adapted layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QLoRALinear)}
