"""Layers: frozen 4-bit linear layers, embeddings and experts, and linear layers with trainable low-rank adapters."""

from qlora.nn.embedding4bit import Embedding4bit
from qlora.nn.experts4bit import Experts4bit
from qlora.nn.linear4bit import Linear4bit
from qlora.nn.merging import MergeReport
from qlora.nn.qlora_linear import QLoRALinear
from qlora.nn.shared_input import share_inputs

__all__ = ["Embedding4bit", "Experts4bit", "Linear4bit", "MergeReport", "QLoRALinear", "share_inputs"]
