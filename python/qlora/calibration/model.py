"""calibrate: goes through a 4-bit model block by block and gives its layers weights that fit their inputs."""

import copy
import hashlib
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
from qlora.calibration.texts import WINDOW, Windows, windows_of
from qlora.calibration.weights import RECIPES, calibrate_weight, solver_for
from qlora.nn import Experts4bit, Linear4bit, QLoRALinear
from qlora.nn.finding import is_inside
from qlora.nn.packed import STATISTICS
from qlora.nn.replacing import replace_module
from qlora.weight import QuantizedWeight

MERGED = "_qlora_merged_in_4_bit"  # attribute of a model whose 4-bit weights contain an adapter
_COMPUTE = torch.float32  # of hidden states and moments, whatever the model's dtype
_BATCH_TOKENS, _BATCHES = 2048, 8  # tokens of a forward pass, unless that makes more batches than about this many
_FAR = 0.5  # relative distance of a 4-bit weight to the dense weight that it was made from: about 0.1


@torch.no_grad()
def calibrate(
    model: nn.Module,
    texts: str | Sequence[str] | Tensor = "default",
    tokenizer: Any = None,
    *,
    weights: str | Path | dict[str, Tensor] | None = None,
    tokens: int = 16384,
    recipe: str = "feedback",
    window: int = WINDOW,
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
    read = dense_weights(_origin(model) if weights is None else weights, model)
    data = windows_of(texts, tokenizer, model, tokens, window)
    run = None
    if partial is not None:
        run = PartialRun(Path(partial), {"recipe": recipe, "windows": data.digest(), **_identity(model, read)})
    return _calibrate(model, data, read, recipe, None, run, on_progress)


def _identity(model: nn.Module, read: ReadDense) -> dict[str, Any]:
    """What a resumed run must share with the first one, besides its text: formats, and samples of the weights."""
    digest = hashlib.sha256()
    formats = set()
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit | Experts4bit):
            formats.add(f"{layer.quant_type}, {layer.block_size}, {_is_double_quantized(layer)}")
            for weight in layer.weight_names if isinstance(layer, Experts4bit) else ["weight"]:
                flat = read(f"{name}.{weight}").flatten()
                sample = flat[:: max(1, len(flat) // 64)].float().cpu()
                digest.update(f"{name}.{weight} {len(flat)} {sample.tolist()}".encode())
    return {"formats": sorted(formats), "weights": digest.hexdigest()}


def _is_double_quantized(layer: Linear4bit | Experts4bit) -> bool:
    return layer.double_quant if isinstance(layer, Experts4bit) else layer.quantized_weight.double_quant


@torch.no_grad()
def calibrate_merged(
    model: nn.Module,
    data: Windows,
    exact: dict[str, Callable[[], Tensor]],
    base: dict[str, QuantizedWeight],
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

    return _calibrate(model, data, read, recipe, base, None, None)


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
    report.left_plain = [
        n
        for n, m in model.named_modules()
        if (isinstance(m, Linear4bit) and n not in inside)
        or (isinstance(m, Experts4bit) and not any(layer.startswith(f"{n}.") for layer in inside))
    ]
    report.seconds = time.monotonic() - start
    return report


def _refuse_adapters(model: nn.Module) -> None:
    names = [n for n, m in model.named_modules() if isinstance(m, Linear4bit) and is_inside(model, n)]
    if names or any(isinstance(m, QLoRALinear) for m in model.modules()):
        raise ValueError(
            f"{names[0] if names else 'a layer'} has an adapter: calibrate a model before it gets adapters"
        )


def _origin(model: Any) -> str:
    if getattr(model, MERGED, False):
        raise ValueError("weights: adapters were merged into the model, so its checkpoint is not what it was made from")
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
        batch_tokens = max(_BATCH_TOKENS, data.tokens // _BATCHES)
        self.batches = [(ids.to(self.device), is_unseen) for ids, is_unseen in data.batches(batch_tokens)]
        self.chain = walk.check_chain(model, name, blocks, self.batches[0][0][:1, :64])
        self.exact: list[Tensor] = []  # hidden states of the dense model, by batch
        self.calls: list[list[walk.Call]] = []  # by batch, then block
        for ids, _ in self.batches:
            hidden, calls = walk.record_calls(model, blocks, ids, self.chain)
            self.exact.append(hidden.to(_COMPUTE))
            done: dict[int, Tensor] = {}
            self.calls.append([call.to(_COMPUTE, done) for call in calls])
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
            experts = {n for n, m in layers.items() if isinstance(m, Experts4bit)}
            exact_outputs, groups = walk.run_dense(dense, list(layers), experts, calls, self.exact)
            reports: list[LayerReport] = []
            stops = [group for group in groups if self._gets_all_tokens(group, layers)]
            for group in groups:
                if group not in stops:
                    reports += self._group(prefix, group, layers, dense, None)
            with SteppedRuns(quantized, calls, self.hidden, [group.first for group in stops]) as runs:
                for group in stops:
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

    def _gets_all_tokens(self, group: walk.Group, layers: dict[str, Any]) -> bool:
        """Whether the modules of a group are called once for each batch, with every token of it.

        Others (a router's experts in a list, a layer that is called twice) may get other tokens in the two streams.
        """
        if isinstance(layers[group.first], Experts4bit):
            return True
        k = layers[group.first].in_features
        return all(
            len(exact) == 1 and exact[0][0].numel() == ids.numel() * k
            for exact, (ids, _) in zip(group.exact, self.batches, strict=True)
        )

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
                stored = module.dequantize(_COMPUTE)
                if self.base is None and (weight - stored).norm() > _FAR * weight.norm():
                    raise ValueError(
                        f"{prefix}.{name}.weight is not the dense weight of the 4-bit layer: pass the weights= that the"
                        " model was loaded from"
                    )
                del stored
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
        found: list[tuple[Any, ...] | None] | None,
    ) -> list[LayerReport]:
        """Calibrates the 4-bit modules of a group in place.

        ``found`` holds their inputs by batch; None: those of the dense model stand for them.
        """
        where = f"{prefix}.{group.first}"
        if isinstance(layers[group.first], Experts4bit):
            assert found is not None
            routed = [
                (now[0], now[1], exact[0][0], is_unseen)
                for now, exact, (_, is_unseen) in zip(found, group.exact, self.batches, strict=True)
                if now and exact
            ]
            return calibrate_experts(where, layers[group.first], dense.get_submodule(group.first), routed, self.recipe)
        k = layers[group.first].in_features
        moments = Moments.zeros(k, self.device, self.recipe, with_cross=found is not None)
        for index, (exact, (_, is_unseen)) in enumerate(zip(group.exact, self.batches, strict=True)):
            now = None if found is None else found[index]
            for call in exact:
                original = call[0].reshape(-1, k)
                moments.add(original if now is None else now[0].reshape(-1, k), original, is_unseen)
        if not moments.square.isfinite().all():
            raise ValueError(f"the inputs of {where} are nan or inf, or overflow when squared")
        try:
            solver, note = solver_for(moments, self.recipe)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
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
        """Nats per unseen token with the dense and with the calibrated blocks; nan for a model without token logits."""
        sums, count = [0.0, 0.0], 0
        for (ids, is_unseen), exact, hidden in zip(self.batches, self.exact, self.hidden, strict=True):
            if not is_unseen or not self.chain.has_logits:
                continue
            for i, states in enumerate((exact, hidden)):
                logits = walk.logits_after(self.model, self.blocks, ids, states, self.chain)
                sums[i] += nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
                ).item()
            count += ids[:, 1:].numel()
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
    return leaf in STATISTICS or any(leaf == w or leaf.startswith(f"{w}_") for w in weights)
