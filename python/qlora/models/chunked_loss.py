"""Computes a causal language model's loss in chunks of a few hundred tokens, without storing all logits at once.

The float32 logits [tokens, vocabulary] and their gradient are the largest tensors of a training step (Llama-3 at 8,192
tokens: 4.2 GB each). Here a chunk of them exists at a time. If the head is frozen, the forward computes a chunk's
gradient too, so the backward only scales it; otherwise ``torch.utils.checkpoint`` computes the chunk once more there.
Each chunk goes through the model's own forward, with the backbone replaced by its stored output, so everything that the
model does to its logits (softcapping, scales, a transform before the head) is included. docs/guides/fine-tune.md
compares this with the chunked losses of TRL and torch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 256  # tokens; 131 MB of float32 logits with a vocabulary of 128,256


@contextmanager
def _backbone_returns(backbone: nn.Module, output: Any) -> Iterator[None]:
    """Makes ``backbone`` return ``output`` inside a ``with`` block."""
    had = vars(backbone).get("forward")
    backbone.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if had is None:
            del backbone.forward
        else:
            backbone.forward = had


def backbone_of(model: Any) -> nn.Module | None:
    """The part of a transformers model below its head; None if the model has no separate head."""
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
    return backbone if isinstance(backbone, nn.Module) and backbone is not model else None


def _is_frozen(model: Any, hidden: Tensor) -> bool:
    """Whether the loss of ``model``'s head has no gradient but that of its input.

    Not where gradients are float16, which need the scale of the loss, nor where parameters are DTensors.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        return False
    inside = {id(p) for p in backbone_of(model).parameters()}  # type: ignore[union-attr]
    embeddings = model.get_input_embeddings()
    tied = {id(p) for p in embeddings.parameters()} if embeddings is not None else set()
    head = [p for p in model.parameters() if id(p) not in inside or id(p) in tied]
    if torch.float16 in (hidden.dtype, *(p.dtype for p in head)):
        return False
    return not any(p.requires_grad or hasattr(p, "device_mesh") for p in head)


class _LossAndGradient(torch.autograd.Function):
    """The sum of ``loss_of(part, target)`` over chunks; its gradient is computed along with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, wanted: Tensor, chunk: int, loss_of: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden)
        for part, target, grad in zip(hidden.split(chunk), wanted.split(chunk), gradient.split(chunk), strict=True):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = loss_of(leaf, target)
            grad.copy_(torch.autograd.grad(loss, leaf)[0])
            total = total + loss.detach()
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scaled = torch.empty_like(gradient)
        for part, out in zip(gradient.split(CHUNK), scaled.split(CHUNK), strict=True):
            out.copy_(part.float() * grad_total)  # in float32: a GPU would round the factor to bfloat16 first
        return scaled, None, None, None


def chunked_loss(
    model: Any, labels: Tensor, positions: Tensor, tokens: Tensor | int, chunk: int = CHUNK, **inputs: Any
) -> Tensor:
    """Sum of the negative log likelihoods at ``positions``, divided by ``tokens``.

    model: a transformers model with a head over a backbone; labels int64 [batch, width]; positions int64 [n], the
    indices into the flattened labels to learn, none in the first column; chunk: positions per chunk. ``inputs`` go to
    the backbone. Hidden state i predicts label i + 1.
    """
    backbone = backbone_of(model)
    assert backbone is not None
    outputs = backbone(**inputs, use_cache=False)
    hidden = outputs.last_hidden_state.flatten(0, 1)[positions - 1]
    wanted = labels.flatten()[positions]
    kind = type(outputs)

    def loss_of(part: Tensor, target: Tensor) -> Tensor:
        with _backbone_returns(backbone, kind(last_hidden_state=part.unsqueeze(0))):
            logits = model(inputs_embeds=part.unsqueeze(0), use_cache=False).logits
        return F.cross_entropy(logits[0].float(), target, reduction="sum")

    if torch.is_grad_enabled() and hidden.requires_grad and _is_frozen(model, hidden):
        return _LossAndGradient.apply(hidden, wanted, chunk, loss_of) / tokens
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, target in zip(hidden.split(chunk), wanted.split(chunk), strict=True):
        total = total + checkpoint(loss_of, part, target, use_reentrant=False)
    return total / tokens


def learnt_positions(labels: Tensor, ignored: int = -100) -> Tensor:
    """Indices into the flattened labels [batch, width] that a causal model learns: int64 [n], on the labels' device.

    It skips ignored labels and the first of each row, which nothing predicts. Call it with labels on the CPU: on a GPU
    it synchronizes.
    """
    known = labels != ignored
    known[:, 0] = False
    return known.flatten().nonzero().flatten()


class ChunkedLoss:
    """Adds the argument ``loss_positions`` to a model's forward; with it the forward returns only the chunked loss."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._forward = model.forward

    def install(self) -> "ChunkedLoss":
        """Makes ``model(…, labels=…, loss_positions=…)`` return ``{"loss": …}``."""
        self._model.forward = self
        return self

    def remove(self) -> None:
        del self._model.forward

    def __call__(self, *args: Any, loss_positions: Tensor | None = None, **kwargs: Any) -> Any:
        if loss_positions is None:
            return self._forward(*args, **kwargs)
        labels = kwargs.pop("labels")
        tokens = kwargs.pop("num_items_in_batch", None)
        kwargs.pop("use_cache", None)
        return {
            "loss": chunked_loss(
                _Original(self._model, self._forward),
                labels,
                loss_positions,
                max(1, len(loss_positions)) if tokens is None else tokens,
                **kwargs,
            )
        }


class _Original:
    """The model as before :class:`ChunkedLoss`: a call runs its own forward, without running its hooks again."""

    def __init__(self, model: Any, forward: Any) -> None:
        self._model, self._forward = model, forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **kwargs: Any) -> Any:
        return self._forward(**kwargs)


@torch.no_grad()
def why_not_chunked(model: Any) -> str | None:
    """Compares :func:`chunked_loss` with the model's own loss on eight tokens; why they differ, or None."""
    if backbone_of(model) is None:
        return f"{type(model).__name__} has no backbone separate from its head"
    device = next(model.parameters()).device
    labels = torch.arange(3, 11, device=device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        own = model(input_ids=labels, labels=labels, use_cache=False).loss
        _is_frozen(model, own)  # a step of training asks this
        ours = chunked_loss(model, labels, learnt_positions(labels), 7, chunk=4, input_ids=labels)
    except (TypeError, AttributeError, KeyError, ValueError, RuntimeError) as error:
        return f"the head of {type(model).__name__} does not run on its own ({error})"
    finally:
        model.train(was_training)
    tolerance = max(1e-4, 2 * torch.finfo(model.dtype).eps)  # rounding of logits depends on the batch shape
    if not abs(own.item() - ours.item()) <= tolerance * max(1.0, abs(own.item())):
        return f"the loss of {type(model).__name__} is {own.item():.4f}, but computed in chunks {ours.item():.4f}"
    return None
