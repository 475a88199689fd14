"""The 4-bit layers of a model by name, with and without an adapter."""

from torch import nn

from qlora.nn import Linear4bit, QLoRALinear


def is_inside(model: nn.Module, name: str) -> bool:
    """Whether a layer is inside an adapted layer of qlora or PEFT."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return isinstance(parent, QLoRALinear) or hasattr(parent, "get_base_layer")


def bare_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """All 4-bit layers of a model that have no adapters of qlora or PEFT, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit) and not is_inside(model, n)}


def qlora_layers(model: nn.Module) -> dict[str, QLoRALinear]:
    """All adapted layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QLoRALinear)}
