"""Integrations with transformers, PEFT and bitsandbytes, each imported on first use."""

from importlib import import_module
from types import ModuleType

METHOD = "qlora"  # name of the quantization method in transformers
_MODULES = ("bitsandbytes", "peft", "transformers")


def __getattr__(name: str) -> ModuleType:
    if name in _MODULES:
        return import_module(f"qlora.integrations.{name}")
    raise AttributeError(f"module 'qlora.integrations' has no attribute '{name}'")
