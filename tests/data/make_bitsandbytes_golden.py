"""Creates bitsandbytes_golden.npz, which contains what bitsandbytes stores for a few weights. Run it by hand:

    pip install bitsandbytes numpy && python tests/data/make_bitsandbytes_golden.py

It contains only cases in which bitsandbytes on the CPU is correct: the last dimension is a multiple of the block size
(otherwise its AVX-512 dequantization is wrong), and no weight is within 1e-6 of a decision threshold (its CPU code
picks the nearest level, its CUDA code compares with the thresholds that the format defines).
"""

from pathlib import Path

import bitsandbytes
import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

CASES = [("nf4", 64, (24, 128)), ("nf4", 128, (16, 256)), ("fp4", 64, (24, 128)), ("fp4", 256, (4, 512))]
OUTPUT = Path(__file__).with_name("bitsandbytes_golden.npz")


def main() -> None:
    arrays = {"version": np.array(bitsandbytes.__version__)}
    for quant_type, block_size, shape in CASES:
        for nested in (False, True):
            generator = torch.Generator().manual_seed(len(arrays))
            weight = torch.randn(shape, generator=generator)
            packed, state = quantize_4bit(
                weight, blocksize=block_size, quant_type=quant_type, compress_statistics=nested
            )
            name = f"{quant_type}-{block_size}-{'nested' if nested else 'plain'}"
            arrays[f"{name}.weight"] = weight.numpy()
            arrays[f"{name}.packed"] = packed.flatten().numpy()
            arrays[f"{name}.absmax"] = state.absmax.numpy()
            arrays[f"{name}.levels"] = state.code.numpy()
            arrays[f"{name}.dequantized"] = dequantize_4bit(packed, state).numpy()
            if nested:
                arrays[f"{name}.nested_absmax"] = state.state2.absmax.numpy()
                arrays[f"{name}.nested_map"] = state.state2.code.numpy()
                arrays[f"{name}.nested_offset"] = np.array([state.offset.item()], dtype=np.float32)
    for nested in (False, True):  # the state dict of a layer, as in a checkpoint
        torch.manual_seed(0)
        layer = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compress_statistics=nested)
        layer = layer.to("cpu")
        name = f"state-{'nested' if nested else 'plain'}"
        arrays |= {f"{name}:{key}": value.numpy() for key, value in layer.state_dict().items()}
        arrays[f"{name}-dequantized"] = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().numpy()
    np.savez_compressed(OUTPUT, **arrays)
    print(f"{OUTPUT.name}: {OUTPUT.stat().st_size} bytes, bitsandbytes {bitsandbytes.__version__}")


if __name__ == "__main__":
    main()
