"""At home in other libraries: transformers, PEFT, bitsandbytes. Each is imported when it is asked for."""

from importlib import import_module
from types import ModuleType

METHOD = "qlora"  # the name of our quantization in transformers
_MODULES = ("bitsandbytes", "peft", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"qlora.integrations.{name}")
    raise AttributeError(f"module 'qlora.integrations' has no attribute '{name}'")
