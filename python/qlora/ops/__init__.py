"""The operators ``torch.ops.qlora.*`` as typed functions.

One file for each operator: the function, its fake kernel (shapes and dtypes for compilers), its derivative and its rule
for autocast. Their schemas stand in ``csrc/ops/schema.cpp``. Each function has a twin of the same signature in
:mod:`qlora.reference`, in plain torch (``adamw_many``: those of ``adamw`` and ``adamw_8bit``).

Extents: m tokens, n out features, k in features, r rank.
"""

from qlora.ops.adamw import adamw, adamw_8bit, adamw_many
from qlora.ops.affine import forward_affine
from qlora.ops.calibrate import quantize_with_feedback, search_scales
from qlora.ops.common import FLOAT_DTYPES, QUANT_TYPES, check_format
from qlora.ops.experts import forward_experts
from qlora.ops.many import forward_many
from qlora.ops.matmul import forward
from qlora.ops.multi import forward_multi
from qlora.ops.quantize import dequantize, quantization_error, quantize

__all__ = [
    "FLOAT_DTYPES",
    "QUANT_TYPES",
    "adamw",
    "adamw_8bit",
    "adamw_many",
    "check_format",
    "dequantize",
    "forward",
    "forward_affine",
    "forward_experts",
    "forward_many",
    "forward_multi",
    "quantization_error",
    "quantize",
    "quantize_with_feedback",
    "search_scales",
]
