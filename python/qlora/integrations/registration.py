"""Registers our quantizer with transformers when that is imported, so that ``import qlora`` is enough for loading.

transformers finds quantizers in tables that only running code can extend, and importing it takes seconds. So a finder
waits for the one module that holds the tables, puts two entries in, and is gone. What they stand for is imported when a
model needs it.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"
METHOD = "qlora"


class _Config:
    """Entry of the table of configs."""

    @staticmethod
    def from_dict(options: dict[str, Any], **kwargs: Any) -> Any:
        from qlora.integrations.transformers import QLoRAConfig

        return QLoRAConfig.from_dict(options, **kwargs)


def _quantizer(config: Any, **kwargs: Any) -> Any:
    """Entry of the table of quantizers."""
    from qlora.integrations.transformers import QLoRAQuantizer

    return QLoRAQuantizer(config, **kwargs)


def _register(table: ModuleType) -> None:
    table.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    table.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer


class _RegisteringLoader(Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__spec__.loader = self._loader  # type: ignore[union-attr]
        _register(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_imported() -> None:
    """Registers now if transformers' quantizers are loaded, else when they are."""
    if _TABLE in sys.modules:
        _register(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
