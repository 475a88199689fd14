"""Writes a dense copy of a model with HQQ's 4-bit weights in its linear layers, as an anchor for measure.py.

    pip install hqq
    python benchmarks/quality/hqq_anchor.py MODEL OUTPUT

Groups of 64 with a scale and a zero point of 16 bit each: 4.5 bits a weight, in HQQ's own layout. It needs no text.
"""

import argparse
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    head = model.get_output_embeddings()
    options = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            packed, meta = Quantizer.quantize(module.weight.data, **options)
            module.weight.data = Quantizer.dequantize(packed, meta).float()
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
