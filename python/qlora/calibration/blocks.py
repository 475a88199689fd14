"""The repeated blocks of a model: finds them, records how the model calls them, and runs one block at a time."""

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.nn import Experts4bit, Linear4bit


class _Stop(Exception):
    """Ends a forward pass whose rest nobody needs."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, blocks): the list of modules with most 4-bit weights, in which no block is inside another list.

    Raises ValueError if the model has no such list.
    """
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not (best is not None and name.startswith(best[0] + ".")):
            weights = sum(m.hidden_numel for m in module.modules() if isinstance(m, Linear4bit | Experts4bit))
            if weights > most:
                best, most = (name, module), weights
    if best is None:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks with 4-bit layers: calibration goes through a model block by"
            " block"
        )
    return best


@dataclass
class Call:
    """One call of a block by its model, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's new hidden states."""
        output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def to(self, dtype: torch.dtype, done: dict[int, Tensor]) -> "Call":
        """With floating-point tensors in ``dtype``; ``done`` holds those already cast, which calls share."""
        return Call(_cast(self.args, dtype, done), _cast(self.kwargs, dtype, done))


def _cast(value: Any, dtype: torch.dtype, done: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return done.setdefault(id(value), value.to(dtype)) if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_cast(item, dtype, done) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype, done) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype, done) for key, item in value.items()}
    return value


@contextmanager
def _forwards(blocks: nn.ModuleList, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Gives block i the forward ``make(i)`` inside a ``with`` block; its hooks and attributes stay."""
    before = [vars(block).get("forward") for block in blocks]
    for index, block in enumerate(blocks):
        vars(block)["forward"] = make(index)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del vars(block)["forward"]
            else:
                vars(block)["forward"] = forward


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    if args:
        return args[0], Call(args[1:], kwargs)
    kwargs = dict(kwargs)
    return kwargs.pop("hidden_states"), Call((), kwargs)


def call_model(model: nn.Module, ids: Tensor) -> Any:
    """The model's output for ``ids`` (batch, length), without a cache."""
    parameters = inspect.signature(model.forward).parameters
    if "input_ids" not in parameters:
        return model(ids)
    return model(input_ids=ids, **({"use_cache": False} if hasattr(model, "config") else {}))


@dataclass(frozen=True)
class Chain:
    """How a model goes through its blocks: each once, in order, each with the output of the one before."""

    tuple_length: int | None  # of what a block returns, which begins with the hidden states; None: a tensor
    has_logits: bool  # whether the model returns logits for each token

    def handed_on(self, hidden: Tensor) -> Any:
        """What a block returns that hands on ``hidden``."""
        return hidden if self.tuple_length is None else (hidden, *(None for _ in range(self.tuple_length - 1)))


def check_chain(model: nn.Module, name: str, blocks: nn.ModuleList, ids: Tensor) -> Chain:
    """Runs the model on a short text ``ids`` and looks at how it calls its blocks.

    Raises ValueError, with the block's name, for a model that is not a chain: the streams of a calibration would not be
    what it computes.
    """
    owners: dict[int, int] = {}
    for index, block in enumerate(blocks):
        for tensor in block.parameters():
            if owners.setdefault(id(tensor), index) != index:
                raise ValueError(f"{name}.{index} shares weights with {name}.{owners[id(tensor)]}: it {_NO_CHAIN}")
    inputs: list[tuple[int, Tensor]] = []
    outputs: list[Any] = []

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append((index, _split(args, kwargs)[0]))

        return hook

    hooks = []
    for index, block in enumerate(blocks):
        hooks.append(block.register_forward_pre_hook(before(index), with_kwargs=True))
        hooks.append(block.register_forward_hook(lambda module, args, output: outputs.append(output)))
    try:
        result = call_model(model, ids)
    finally:
        for handle in hooks:
            handle.remove()
    order = [index for index, _ in inputs]
    if order != list(range(len(blocks))):
        raise ValueError(f"{type(model).__name__} calls the blocks of {name} in the order {order[:20]}: it {_NO_CHAIN}")
    states = [output[0] if isinstance(output, tuple) else output for output in outputs]
    for index in range(1, len(blocks)):
        if inputs[index][1].shape != states[index - 1].shape or not torch.equal(inputs[index][1], states[index - 1]):
            raise ValueError(f"{name}.{index} does not get what {name}.{index - 1} returns: the model {_NO_CHAIN}")
    logits = getattr(result, "logits", result)
    return Chain(
        len(outputs[0]) if isinstance(outputs[0], tuple) else None,
        isinstance(logits, Tensor) and logits.dim() == 3 and logits.shape[:2] == ids.shape,
    )


_NO_CHAIN = "cannot be calibrated block by block"


def record_calls(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, chain: Chain) -> tuple[Tensor, list[Call]]:
    """The hidden states that enter the first block for ``ids``, and how the model calls each block.

    No block runs: each hands on what it got. So calls must depend only on positions (masks, rotary embeddings) and on
    the tokens, as they do in language models.
    """
    first: list[Tensor] = []
    calls: list[Call] = []

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, call = _split(args, kwargs)
            if not calls:
                first.append(hidden)
            calls.append(call)
            if index == len(blocks) - 1:
                raise _Stop
            return chain.handed_on(hidden)

        return forward

    with _forwards(blocks, make), suppress(_Stop):
        call_model(model, ids)
    return first[0], calls


def logits_after(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hidden: Tensor, chain: Chain) -> Tensor:
    """The model's logits for ``ids`` if its last block returns ``hidden``; no block runs."""

    def make(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            entered, _ = _split(args, kwargs)
            return chain.handed_on(hidden.to(entered.dtype) if index == len(blocks) - 1 else entered)

        return forward

    with _forwards(blocks, make):
        output = call_model(model, ids)
    return getattr(output, "logits", output)


@dataclass
class Group:
    """Modules of a block that get the same inputs."""

    names: list[str]
    exact: list[list[tuple[Any, ...]]]  # by batch, of each call: the positional inputs in the dense model

    @property
    def first(self) -> str:
        return self.names[0]


def run_dense(
    block: nn.Module, names: Sequence[str], alone: Collection[str], calls: Sequence[Call], hidden: Sequence[Tensor]
) -> tuple[list[Tensor], list[Group]]:
    """Runs a dense block on all batches: its outputs, and the modules ``names`` in groups of equal inputs.

    Groups are in the order of their first calls; those of ``alone`` have one module. A module that is never called is
    in no group.
    """
    group_of: dict[str, Group] = {}
    groups: list[Group] = []
    outputs = []
    for batch, (call, states) in enumerate(zip(calls, hidden, strict=True)):
        seen: list[tuple[Tensor, str]] = []  # keeps the inputs alive, so that "is" compares them

        def note(name: str, inputs: tuple[Any, ...], batch: int = batch, seen: list = seen) -> None:
            if name not in group_of:
                twins = (group_of[other] for x, other in seen if x is inputs[0] and other not in alone)
                twin = None if name in alone else next(twins, None)
                group = twin or Group([], [])
                if twin is None:
                    groups.append(group)
                group.names.append(name)
                group_of[name] = group
            seen.append((inputs[0], name))
            group = group_of[name]
            if group.first == name:
                group.exact.extend([] for _ in range(batch + 1 - len(group.exact)))
                group.exact[batch].append(detached_inputs(inputs))

        with inputs_noted(block, names, note):
            outputs.append(call.run(block, states))
    for group in groups:
        group.exact.extend([] for _ in range(len(hidden) - len(group.exact)))
    return outputs, groups


def detached_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in inputs)


@contextmanager
def inputs_noted(
    block: nn.Module, names: Sequence[str], note: Callable[[str, tuple[Any, ...]], None]
) -> Iterator[None]:
    """Calls ``note(name, inputs)`` before each call of the modules ``names``, inside a ``with`` block."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(name, (*args, *kwargs.values()))

        return hook

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook_of(name), with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
