"""PEFT: ``get_peft_model`` puts a fused LoRA layer on 4-bit layers, and its files stay PEFT's.

``import qlora`` arranges for PEFT to use these layers (:mod:`qlora.integrations.registration`). A LoraConfig needs
nothing, and adapters that are loaded later run fused as well.
"""

from qlora.integrations.peft.choice import create_module
from qlora.integrations.peft.layers import LoraEmbedding4bit, LoraExperts4bit, LoraLinear4bit
from qlora.integrations.peft.models import initialize_loftq, lora_layers, merge_peft, mixed_adapters

__all__ = [
    "LoraEmbedding4bit",
    "LoraExperts4bit",
    "LoraLinear4bit",
    "create_module",
    "initialize_loftq",
    "lora_layers",
    "merge_peft",
    "mixed_adapters",
]
