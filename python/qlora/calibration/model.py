"""calibrate: goes through a 4-bit model block by block and gives its layers weights that fit their inputs."""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.calibration import blocks as walk
from qlora.calibration.dense import ReadDense, dense_weights
from qlora.calibration.experts import calibrate_experts
from qlora.calibration.moments import Moments
from qlora.calibration.report import CalibrationReport, LayerReport
from qlora.calibration.resume import PartialRun
from qlora.calibration.stepping import SteppedRuns
from qlora.calibration.texts import Windows, windows_of
from qlora.calibration.weights import RECIPES, Solver, calibrate_weight, why_not_feedback
from qlora.nn import Experts4bit, Linear4bit, QLoRALinear
from qlora.nn.finding import is_inside
from qlora.nn.replacing import replace_module
from qlora.storage.fingerprint import checkpoint_fingerprint
from qlora.weight import QuantizedWeight

_COMPUTE = torch.float32  # of hidden states and moments, whatever the model's dtype
_BATCH_TOKENS = 2048  # per forward pass of a block


@torch.no_grad()
def calibrate(
    model: nn.Module,
    texts: str | Sequence[str] | Tensor = "default",
    tokenizer: Any = None,
    *,
    weights: str | Path | dict[str, Tensor] | None = None,
    tokens: int = 16384,
    recipe: str = "feedback",
    window: int = 512,
    partial: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationReport:
    """Replaces the weights of a model's 4-bit layers, in place, by ones that lose less for inputs like ``texts``.

    The format stays the same, so readers of it (qlora, bitsandbytes) need not know. Blocks are calibrated one after the
    other, each with the inputs that it gets from the blocks before it, so that it also makes up for their errors.
    Layers outside of the blocks (a quantized head) stay as they are.

    Args:
        model: a model with 4-bit layers: loaded with ``QLoRAConfig`` or made by ``prepare_model(model, rank=None)``.
        texts: "default" (general text that comes with qlora), a list of texts, or token ids, int64 [count] or
            (windows, length).
        tokenizer: makes tokens of texts; by default that of the model's folder.
        weights: the dense weights: a model folder, a safetensors file, or a mapping by parameter name. By default the
            folder or id that the model was loaded from.
        tokens: how many to use for calibration; an eighth more, at most 1,024, judge the result.
        recipe: "feedback", or "scales", which needs few tokens and a third of the time, and gains less.
        window: tokens in a row; at most the model's context.
        partial: a folder that keeps finished blocks; a call with the same arguments continues from there.
        on_progress: called with (blocks done, blocks).

    Raises ValueError for a model without 4-bit blocks or with adapters, for too little text, for tokens outside of the
    model's vocabulary, and, with the layer's name, for activations that are nan or inf.
    """
    _refuse_adapters(model)
    weights = _origin(model) if weights is None else weights
    read = dense_weights(weights, model)
    data = windows_of(texts, tokenizer, model, tokens, window)
    run = None
    if partial is not None:
        run = PartialRun(Path(partial), {"recipe": recipe, "windows": data.digest(), **_identity(model, weights)})
    return _calibrate(model, data, read, recipe, None, run, on_progress)


def _identity(model: nn.Module, weights: str | Path | dict[str, Tensor]) -> dict[str, Any]:
    """What a resumed run must share with the first one, besides its text."""
    layers = [m for m in model.modules() if isinstance(m, Linear4bit | Experts4bit)]
    is_folder = not isinstance(weights, dict) and Path(weights).is_dir()
    return {
        "formats": sorted({f"{m.quant_type}, {m.block_size}, {_is_double_quantized(m)}" for m in layers}),
        "layers": len(layers),
        "weights": checkpoint_fingerprint(Path(str(weights))) if is_folder else None,
    }


def _is_double_quantized(layer: Linear4bit | Experts4bit) -> bool:
    return layer.double_quant if isinstance(layer, Experts4bit) else layer.quantized_weight.double_quant


@torch.no_grad()
def calibrate_merged(
    model: nn.Module,
    texts: str | Sequence[str] | Tensor,
    tokenizer: Any,
    exact: dict[str, Callable[[], Tensor]],
    base: dict[str, QuantizedWeight],
    *,
    tokens: int = 16384,
    recipe: str = "feedback",
) -> CalibrationReport:
    """Calibrates the layers of ``model`` into which adapters were merged; the others stay as they are.

    ``exact`` computes base + adapter of a layer by its name, float32 (out, in); ``base`` holds its weight before. The
    reports say how much of the adapter's change of the outputs is kept.
    """
    layers = dict(model.named_modules())

    def read(name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        weight = exact[layer]()
        return weight if getattr(layers[layer], "dense_class", nn.Linear) is nn.Linear else weight.t()

    return _calibrate(model, windows_of(texts, tokenizer, model, tokens, 512), read, recipe, base, None, None)


def _calibrate(
    model: nn.Module,
    data: Windows,
    read: ReadDense,
    recipe: str,
    base: dict[str, QuantizedWeight] | None,
    partial: PartialRun | None,
    on_progress: Callable[[int, int], None] | None,
) -> CalibrationReport:
    start = time.monotonic()
    if recipe not in RECIPES:
        raise ValueError(f"recipe='{recipe}' is unknown: use one of {', '.join(RECIPES)}")
    devices = {str(p.device) for p in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"the model is on {sorted(devices)}: calibration needs it on one device")
    name, blocks = walk.find_blocks(model)
    was_training = model.training
    model.eval()
    try:
        run = _Run(model, name, blocks, read, data, recipe, base, partial)
        for index in range(len(blocks)):
            if on_progress is not None:
                on_progress(index, len(blocks))
            run.block(index)
        if on_progress is not None:
            on_progress(len(blocks), len(blocks))
        report = run.report
        report.loss_before, report.loss_after = run.losses()
    finally:
        model.train(was_training)
    inside = {layer.name for layer in report.layers}
    report.left_plain = [n for n, m in model.named_modules() if isinstance(m, Linear4bit) and n not in inside]
    report.seconds = time.monotonic() - start
    return report


def _refuse_adapters(model: nn.Module) -> None:
    names = [n for n, m in model.named_modules() if isinstance(m, Linear4bit) and is_inside(model, n)]
    if names or any(isinstance(m, QLoRALinear) for m in model.modules()):
        raise ValueError(
            f"{names[0] if names else 'a layer'} has an adapter: calibrate a model before it gets adapters"
        )


def _origin(model: Any) -> str:
    path = getattr(model, "name_or_path", "")
    if not path:
        raise ValueError("weights: pass the dense weights; the model does not say from where it was loaded")
    return path


class _Run:
    """The two streams of hidden states, dense and quantized, on their way through the blocks."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        blocks: nn.ModuleList,
        read: ReadDense,
        data: Windows,
        recipe: str,
        base: dict[str, QuantizedWeight] | None,
        partial: PartialRun | None,
    ) -> None:
        self.model, self.name, self.blocks, self.read, self.recipe = model, name, blocks, read, recipe
        self.partial = partial
        self.base = base  # of layers with a merged adapter, the only ones to calibrate; None: all layers
        self.report = CalibrationReport(data.tokens, data.unseen_tokens, recipe)
        self.device = next(model.parameters()).device
        self.batches = [(ids.to(self.device), is_unseen) for ids, is_unseen in data.batches(_BATCH_TOKENS)]
        self.as_tuple = walk.returns_tuple(model, blocks, self.batches[0][0][:1, :2])
        self.exact: list[Tensor] = []  # hidden states of the dense model, by batch
        self.calls: list[list[walk.Call]] = []  # by batch, then block
        for ids, _ in self.batches:
            hidden, calls = walk.record_calls(model, blocks, ids, self.as_tuple)
            self.exact.append(hidden.to(_COMPUTE))
            self.calls.append([call.to(self.device, _COMPUTE) for call in calls])
        self.hidden = list(self.exact)

    def block(self, index: int) -> None:
        """Calibrates one block and takes both streams through it."""
        block = self.blocks[index]
        prefix = f"{self.name}.{index}"
        quantized = copy.deepcopy(block).to(_COMPUTE)
        layers = {
            n: m
            for n, m in quantized.named_modules()
            if isinstance(m, Linear4bit | Experts4bit) and (self.base is None or f"{prefix}.{n}" in self.base)
        }
        dense = self._dense_block(quantized, prefix, list(layers))
        calls = [calls[index] for calls in self.calls]
        finished = None if self.partial is None else self.partial.load(index)
        if finished is None:
            exact_outputs, groups = walk.run_dense(dense, list(layers), calls, self.exact)
            reports: list[LayerReport] = []
            with SteppedRuns(quantized, calls, self.hidden, [group.first for group in groups]) as runs:
                for group in groups:
                    reports += self._group(prefix, group, layers, dense, runs.inputs(group.first))
                self.hidden = runs.outputs()
            finished = {n: t for n, t in quantized.state_dict().items() if _belongs(n, layers)}, reports
            if self.partial is not None:
                self.partial.save(index, *finished)
        else:
            _copy(finished[0], quantized)
            exact_outputs = [call.run(dense, hidden) for call, hidden in zip(calls, self.exact, strict=True)]
            self.hidden = [call.run(quantized, hidden) for call, hidden in zip(calls, self.hidden, strict=True)]
        tensors, reports = finished
        _copy(tensors, block)
        self.report.layers += reports
        self.exact = exact_outputs
        for calls_of_batch in self.calls:
            calls_of_batch[index] = walk.Call((), {})  # frees masks and embeddings of this block
        if not all(hidden.isfinite().all() for hidden in self.hidden):
            raise ValueError(f"{prefix} gives nan or inf: calibration needs finite activations")

    def _dense_block(self, quantized: nn.Module, prefix: str, names: list[str]) -> nn.Module:
        """A copy of a block in which the layers ``names`` have their dense weights."""
        dense = copy.deepcopy(quantized)
        for name in names:
            module = dense.get_submodule(name)
            if isinstance(module, Linear4bit):
                weight = self.read(f"{prefix}.{name}.weight").to(self.device, _COMPUTE)
                if module.dense_class is not nn.Linear:
                    weight = weight.t().contiguous()
                if tuple(weight.shape) != module.matrix_shape():
                    raise ValueError(
                        f"{prefix}.{name}.weight has shape {tuple(weight.shape)}: the 4-bit layer has"
                        f" {module.matrix_shape()}"
                    )
                replace_module(dense, module, module.dense_twin(weight, module.bias))
            elif isinstance(module, Experts4bit):
                tensors = {n: self.read(f"{prefix}.{name}.{n}").to(self.device, _COMPUTE) for n in module.weight_names}
                replace_module(dense, module, module.dense_twin(tensors))
        return dense

    def _group(
        self,
        prefix: str,
        group: walk.Group,
        layers: dict[str, Any],
        dense: nn.Module,
        found: list[tuple[Any, ...] | None],
    ) -> list[LayerReport]:
        """Calibrates the 4-bit modules of a group in place; ``found`` holds their inputs by batch."""
        if isinstance(layers[group.first], Experts4bit):
            routed = [
                (now[0], now[1], exact[0][0], is_unseen)
                for now, exact, (_, is_unseen) in zip(found, group.exact, self.batches, strict=True)
                if now and exact
            ]
            name = group.first
            return calibrate_experts(f"{prefix}.{name}", layers[name], dense.get_submodule(name), routed, self.recipe)
        k = layers[group.first].in_features
        moments = Moments.zeros(k, self.device, with_cross=self.recipe == "feedback")
        for now, exact, (_, is_unseen) in zip(found, group.exact, self.batches, strict=True):
            if now is None:
                continue
            inputs = now[0].reshape(-1, k)
            original = exact[0][0].reshape(-1, k) if exact else inputs
            # A router may send other tokens to a module than in the dense model: then only its own inputs count.
            moments.add(inputs, original if original.shape == inputs.shape else inputs, is_unseen)
        where = f"{prefix}.{group.first}"
        if not moments.square.isfinite().all():
            raise ValueError(f"the inputs of {where} are nan or inf, or overflow when squared")
        note = why_not_feedback(moments, k) if self.recipe == "feedback" else ""
        solver = None
        if self.recipe == "feedback" and not note and moments.square.diagonal().sum() > 0:
            solver = Solver.of(moments)
        reports = []
        for name in group.names:
            twin: Any = dense.get_submodule(name)
            weight = twin.weight if layers[name].dense_class is nn.Linear else twin.weight.t().contiguous()
            try:
                result = calibrate_weight(weight, moments, solver, layers[name].quantized_weight, note)
            except RuntimeError as error:
                raise ValueError(f"{prefix}.{name}: {error}") from error
            layers[name].adopt(result.weight)
            kept = None if self.base is None else moments.kept(self.base[f"{prefix}.{name}"], weight, result.weight)
            reports.append(
                LayerReport(f"{prefix}.{name}", result.method, result.error, result.plain_error, result.note, kept)
            )
        return reports

    def losses(self) -> tuple[float, float]:
        """Nats per unseen token of the dense and of the calibrated model."""
        sums, count = [0.0, 0.0], 0
        for (ids, is_unseen), exact, hidden in zip(self.batches, self.exact, self.hidden, strict=True):
            if not is_unseen:
                continue
            for row in range(len(ids)):
                window = ids[row : row + 1]
                for i, states in enumerate((exact, hidden)):
                    logits = walk.logits_after(self.model, self.blocks, window, states[row : row + 1], self.as_tuple)
                    sums[i] += nn.functional.cross_entropy(
                        logits[0, :-1].float(), window[0, 1:], reduction="sum"
                    ).item()
                count += window.shape[1] - 1
        return (sums[0] / count, sums[1] / count) if count else (float("nan"), float("nan"))


def _copy(tensors: dict[str, Tensor], block: nn.Module) -> None:
    own = block.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _belongs(tensor: str, layers: dict[str, Any]) -> bool:
    """Whether a block's tensor is part of a 4-bit weight."""
    module, _, leaf = tensor.rpartition(".")
    if module not in layers or leaf == "_extra_state":
        return False
    weights = layers[module].weight_names if isinstance(layers[module], Experts4bit) else ["weight"]
    return any(leaf == w or leaf.startswith(f"{w}_") for w in weights) or leaf in (
        "absmax",
        "nested_absmax",
        "nested_offset",
    )
