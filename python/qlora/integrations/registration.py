"""Registers the quantizer with transformers and the LoRA layers with PEFT; ``import qlora`` is enough.

Both libraries keep such entries in tables or functions that only running code can extend, and importing them takes
seconds. So an import hook waits until the modules with these tables are imported, and then adds the entries. It imports
nothing itself: an entry imports its implementation when a model needs it. The functions that count and average
parameters are patched in the same way.
"""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from qlora.integrations import METHOD


class _Config:
    """Entry in transformers' table of configs."""

    @staticmethod
    def from_dict(options: dict[str, Any], **kwargs: Any) -> Any:
        from qlora.integrations.transformers import QLoRAConfig

        return QLoRAConfig.from_dict(options, **kwargs)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Entry in transformers' table of quantizers."""
    from qlora.integrations.transformers import QLoRAQuantizer

    return QLoRAQuantizer(config, **kwargs)


def _register_quantizer(table: ModuleType) -> None:
    table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    table.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer


def _register_lora_layers(model: ModuleType) -> None:
    """Wraps the static method in which PEFT chooses the LoRA layer for a module, so that qlora's layers come first.

    LoraConfig's custom modules are no alternative: they are not saved with an adapter, which would then silently run
    unfused.
    """
    choose = model.LoraModel._create_new_module

    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        from qlora.integrations.peft import create_module

        return create_module(lora_config, adapter_name, target, **kwargs) or choose(
            lora_config, adapter_name, target, **kwargs
        )

    model.LoraModel._create_new_module = staticmethod(create)


def _counting(name: str) -> Callable[[ModuleType], None]:
    def change(module: ModuleType) -> None:
        from qlora.integrations import counting

        getattr(counting, name)(module)

    return change


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "transformers.modeling_utils": _counting("count_for_transformers"),
    "peft.tuners.lora.model": _register_lora_layers,
    "peft.peft_model": _counting("count_for_peft"),
    "torch.utils.flop_counter": _counting("count_operations"),
    "torch.optim.swa_utils": _counting("average_floats_only"),
}


class _RegisteringLoader(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__spec__.loader = self._loader  # type: ignore[union-attr]
        _AFTER_IMPORT[module.__name__](module)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.waiting = set(_AFTER_IMPORT)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        self.waiting.remove(name)  # so that the call below asks the other finders
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Registers with the libraries that are already imported, and waits for the others."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    finder = _Finder()
    for name in _AFTER_IMPORT:
        if name in sys.modules:
            finder.waiting.remove(name)
            _AFTER_IMPORT[name](sys.modules[name])
    sys.meta_path.insert(0, finder)
