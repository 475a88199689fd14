"""4-bit layers that serve: each token goes through the adapter of its own request, in one fused operation."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora import ops
from qlora.adapters.factors import Factors
from qlora.nn import Linear4bit
from qlora.nn.replacing import has_hooks, replace_module

BASE = -1  # the slot of tokens that use the base alone


class Routing:
    """Which slot each token of the current batch uses. All served layers of a model share one.

    ``slots`` is a buffer of fixed address, int64 [capacity], so that a captured CUDA graph reads the newest batch.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.slots = torch.full((capacity,), BASE, dtype=torch.int64, device=device)
        self.tokens = 0
        self.only_base = True

    def set(self, slots: list[int], counts: list[int], padded: int | None = None) -> None:
        """Gives ``counts[i]`` tokens the slot ``slots[i]``, in order; tokens up to ``padded`` use the base."""
        total = sum(counts)
        self.tokens = max(total, padded or 0)
        if self.tokens > len(self.slots):
            raise ValueError(f"a batch of {self.tokens} tokens exceeds the routing's capacity of {len(self.slots)}")
        of_token = torch.repeat_interleave(torch.tensor(slots), torch.tensor(counts))
        self.slots[:total].copy_(of_token)
        self.slots[total : self.tokens].fill_(BASE)
        self.only_base = all(slot == BASE for slot in slots)

    def of_rows(self, rows: int) -> Tensor:
        """The slot of each of ``rows`` rows, int64. Raises RuntimeError unless the batch has as many tokens."""
        if rows != self.tokens:
            raise RuntimeError(
                f"a layer with adapters got {rows} rows in a batch of {self.tokens} tokens: this model drops or adds"
                " tokens inside its layers, so adapters cannot be chosen for each token"
            )
        return self.slots[:rows]


class ServedLinear(nn.Module):
    """A 4-bit layer and the adapters of all slots, stacked: lora_a [slots, r, in], lora_b [slots, out, r].

    The rank r is the largest so far; smaller ones are padded with zeros. A slot without an adapter here holds zeros.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor

    def __init__(self, base: Linear4bit, routing: Routing, slots: int, rank: int) -> None:
        super().__init__()
        self.base = base
        self.routing = routing
        device = base.weight.device  # the factors are float32, as PEFT keeps those that it loads
        self.register_buffer("lora_a", torch.zeros(slots, rank, base.in_features, device=device), persistent=False)
        self.register_buffer("lora_b", torch.zeros(slots, base.out_features, rank, device=device), persistent=False)
        self.register_buffer("scaling", torch.zeros(slots, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.routing
        if routing.only_base:
            return self.base.run(x)
        base: Any = self.base
        slots = routing.of_rows(x.numel() // x.shape[-1])
        compute = base.compute_dtype or x.dtype
        adapters: Any = (self.lora_a, self.lora_b, self.scaling, slots, base._parameters["bias"])
        y = ops.forward_multi(x.to(compute), *(*base.quantized_weight.arguments, *adapters))
        return y.to(x.dtype)

    def grow(self, rank: int) -> None:
        """Makes room for adapters of ``rank``; existing ones keep their values."""
        missing = rank - self.lora_a.shape[1]
        if missing > 0:
            self.lora_a = nn.functional.pad(self.lora_a, (0, 0, 0, missing))
            self.lora_b = nn.functional.pad(self.lora_b, (0, missing))

    @torch.no_grad()
    def put(self, slot: int, adapter: Factors | None) -> None:
        """Writes an adapter, or zeros, into a slot in place."""
        self.lora_a[slot].zero_()
        self.lora_b[slot].zero_()
        self.scaling[slot] = 0.0 if adapter is None else adapter.scaling
        if adapter is not None:
            rank = adapter.a.shape[0]
            self.lora_a[slot, :rank].copy_(adapter.a)
            self.lora_b[slot, :, :rank].copy_(adapter.b)


class AdapterStacks:
    """All served layers of one model. A layer becomes a served layer when the first adapter for it arrives."""

    def __init__(self, model: nn.Module, routing: Routing, slots: int) -> None:
        self.model, self.routing, self.slots = model, routing, slots
        self.bases = {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit) and not has_hooks(m)}
        self.layers: dict[str, ServedLinear] = {}

    @contextmanager
    def keeping_layers_of_all_tokens(self) -> Iterator[None]:
        """Keeps, of the layers that run inside a ``with`` block, those that get every token of each batch.

        Others (a head that only gets last tokens, an expert that gets its own) cannot choose adapters by token.
        """
        fits: dict[str, bool] = {}

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
            def see(module: nn.Module, args: tuple[Tensor]) -> None:
                rows = args[0].numel() // args[0].shape[-1]
                fits[name] = fits.get(name, True) and rows == self.routing.tokens

            return see

        hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in self.bases.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.bases = {name: layer for name, layer in self.bases.items() if fits.get(name)}

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the layers that can have adapters, by name."""
        return {name: layer.matrix_shape() for name, layer in self.bases.items()}

    def put(self, slot: int, adapter: Mapping[str, Factors]) -> None:
        """Writes an adapter, by layer names, into a slot. No batch may run meanwhile.

        Layers may change their class or their shapes, so graphs that were captured before are invalid.
        """
        for name, factors in adapter.items():
            rank = factors.a.shape[0]
            if name not in self.layers:
                base = self.bases[name]
                served = ServedLinear(base, self.routing, self.slots, rank).train(base.training)
                replace_module(self.model, base, served)
                self.layers[name] = served
            self.layers[name].grow(rank)
        for name, layer in self.layers.items():
            layer.put(slot, adapter.get(name))
