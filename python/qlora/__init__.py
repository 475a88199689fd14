"""QLoRA for PyTorch: 4-bit frozen weights and one fused dequantize-matmul plus low-rank add, forward and backward.

``import qlora`` needs only torch. Training, adapters and the command line need the extra ``[train]``, in a checkout
``pip install '.[train]'``, and import their libraries when they are used.
"""

from importlib.metadata import version as _version
from typing import Any as _Any

from qlora import distributed, integrations, nn, ops, optim, reference
from qlora.adapters.files import load_adapter, save_adapter
from qlora.adapters.merging import merge_and_unload
from qlora.calibration import CalibrationReport, calibrate
from qlora.explain import Explanation, explain
from qlora.integrations.registration import register_when_imported as _register_when_imported
from qlora.models.prepare import PreparedReport, prepare_model
from qlora.weight import QuantizedWeight, quantize

__version__ = _version("fused-qlora")

_register_when_imported()


def __getattr__(name: str) -> _Any:
    """Imports QLoRAConfig on first use, because it needs transformers."""
    if name == "QLoRAConfig":
        from qlora.integrations.transformers import QLoRAConfig

        return QLoRAConfig
    raise AttributeError(f"module 'qlora' has no attribute '{name}'")


__all__ = [
    "CalibrationReport",
    "Explanation",
    "PreparedReport",
    "QLoRAConfig",
    "QuantizedWeight",
    "calibrate",
    "distributed",
    "explain",
    "integrations",
    "load_adapter",
    "merge_and_unload",
    "nn",
    "ops",
    "optim",
    "prepare_model",
    "quantize",
    "reference",
    "save_adapter",
]
