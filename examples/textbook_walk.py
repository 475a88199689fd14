"""Works through QLoRA on an 8 x 8 weight with rank 2: the memory as textbooks count it, and what they omit.

Run: python examples/textbook_walk.py (needs only torch and qlora). docs/notes/textbook-walk.md explains each line.
"""

import torch

import qlora
from qlora import _C


def kib(size: float) -> str:
    return f"{size / 1024:.4f} KB"


def main() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 8, bias=False)
    layer = qlora.nn.QLoRALinear(linear, rank=2, block_size=32, double_quant=False)

    bytes_of = layer.diagnostics()
    base, adapters, scales = bytes_of["base_bytes"], bytes_of["adapter_bytes"], bytes_of["statistics_bytes"]
    print(f"base      64 weights x 4 bit            {kib(base)}")
    print(f"adapters  (2 x 8 + 8 x 2) x float32     {kib(adapters)}")
    print(f"total                                   {kib(base + adapters)}")
    print(f"scales    2 blocks of 32 x float32      {kib(scales)}   (which textbooks omit)")
    print(f"in memory                               {kib(base + adapters + scales)}")
    print(f"dense     64 weights x float32          {kib(64 * 4)}")

    print("\nThe first block: codes, their levels, and the scale")
    weight = layer.base.quantized_weight
    codes = torch.stack((weight.packed >> 4, weight.packed & 0xF), 1).flatten()[:8]
    levels = torch.tensor(_C.codebook("nf4"))
    print("codes       ", codes.tolist())
    print("x absmax    ", [round(v, 4) for v in (levels[codes.long()] * weight.absmax[0]).tolist()])
    print("dequantized ", [round(v, 4) for v in weight.dequantize().flatten()[:8].tolist()])
    print("original    ", [round(v, 4) for v in linear.weight.detach().flatten()[:8].tolist()])

    print("\nForward: one fused operation equals base + alpha / r * x A' B'")
    with torch.no_grad():
        layer.lora_b["default"].normal_()
        x = torch.randn(3, 8)
        by_hand = x @ weight.dequantize().T + 1.0 * (x @ layer.lora_a["default"].T @ layer.lora_b["default"].T)
        print("largest difference", f"{(layer(x) - by_hand).abs().max():.1e}")

    print("\nThe affine form: x=[[2, 1]], every q=5, scale 0.2, zero point -0.5, B=[[.1], [.1]], A=[[.5, .5]], alpha 2")
    y = qlora.ops.forward_affine(
        torch.tensor([[2.0, 1.0]]),
        torch.full((2, 2), 5, dtype=torch.int8),
        scale=0.2,
        zero_point=-0.5,
        B=torch.tensor([[0.1], [0.1]]),
        A=torch.tensor([[0.5, 0.5]]),
        alpha=2.0,
    )
    print("y =", [[round(v, 4) for v in row] for row in y.tolist()])


if __name__ == "__main__":
    main()
