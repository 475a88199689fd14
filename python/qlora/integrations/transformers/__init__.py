"""transformers: ``from_pretrained(…, quantization_config=qlora.QLoRAConfig())`` loads, quantizes, saves and reloads.

transformers has no entry points for quantizers: ``import qlora`` registers this one when transformers is imported
(:mod:`qlora.integrations.registration`).
"""

from qlora.integrations.transformers.config import QLoRAConfig, is_mxfp4, mxfp4_config
from qlora.integrations.transformers.layers import make_dense, quantized_layers
from qlora.integrations.transformers.quantizer import QLoRAQuantizer

__all__ = ["QLoRAConfig", "QLoRAQuantizer", "is_mxfp4", "make_dense", "mxfp4_config", "quantized_layers"]
