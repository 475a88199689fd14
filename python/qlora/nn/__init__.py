"""Layers: a frozen 4-bit linear layer, and the same with trainable low-rank adapters."""

from qlora.nn.experts4bit import Experts4bit
from qlora.nn.linear4bit import Linear4bit
from qlora.nn.qlora_linear import MergeReport, QLoRALinear

__all__ = ["Experts4bit", "Linear4bit", "MergeReport", "QLoRALinear"]
