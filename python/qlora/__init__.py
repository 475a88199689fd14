"""QLoRA for PyTorch: 4-bit frozen weights and one fused dequantize-matmul plus low-rank add, forward and backward.

``import qlora`` needs only torch. Training, adapters and the command line need ``pip install 'qlora[train]'`` and
import their libraries when they are used.
"""

from importlib.metadata import version as _version

from qlora import nn, ops, reference
from qlora.explain import Explanation, explain
from qlora.models.adapters import load_adapter, save_adapter
from qlora.models.merging import merge_and_unload
from qlora.models.prepare import PreparedReport, prepare_model
from qlora.weight import QuantizedWeight, quantize

__version__ = _version("qlora")

__all__ = [
    "Explanation",
    "PreparedReport",
    "QuantizedWeight",
    "explain",
    "load_adapter",
    "merge_and_unload",
    "nn",
    "ops",
    "prepare_model",
    "quantize",
    "reference",
    "save_adapter",
]
