"""Counts the kernels' PTX instructions, memory sectors and bank conflicts, for the table in docs/notes/cuda-kernels.md.

    PTXEMU=… QLORA_SIMT_LIBRARY=… python tools/ptx_counts.py [--hot]

Warp instructions and mma are per 1,000 4-bit weights at n=1024, k=4096; those of experts per 1,000 weights of the eight
experts of (1536, 2048). It also counts ideal / actual sectors of global
memory (loads, stores, cp.async), and bank conflicts of the whole launch.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import cases
from ptx import executor

import qlora

N, K = 1024, 4096


def weigh(result, weights: int) -> tuple[float, float, float, int]:
    per_thousand = weights / 1000
    kinds = ("g_ld", "g_st", "cp")
    ideal, sectors = (sum(result[f"{kind}_{what}"] for kind in kinds) for what in ("ideal", "sect"))
    kinds = ("s_ld", "s_st", "lm", "cs")
    conflicts = sum(result[f"{kind}_wave"] - result[f"{kind}_ideal"] for kind in kinds)
    mma = sum(result["mma"].values())
    return result["warp_insts"] / per_thousand, mma / per_thousand, 100 * ideal / max(1, sectors), conflicts


def run(name: str, call, arch: str, hot: bool, sm_count: int, weights: int) -> None:
    with executor.ptx(arch, sm_count=sm_count, checks="none") as running:
        call()
    for result in running.results:
        instructions, mma, sectors, conflicts = weigh(result, weights)
        kernel = result["kernel"].split("(")[0].removeprefix("void ").replace("qlora::cuda::", "")
        print(f"| {name:<22} | {kernel:<40} | {instructions:8.1f} | {mma:6.1f} | {sectors:5.1f} % | {conflicts:8d} |")
        if hot:
            for key in ("exec", "sectors", "conflicts"):
                for line in result.hot(30 if key == "exec" else 6, key):
                    print("     ", key, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="sm_80", choices=executor.ARCHS)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--sms", type=int, default=108, help="SMs of the GPU that tiles are chosen for; 8: the largest tile"
    )
    parser.add_argument("--hot", action="store_true", help="print the most expensive lines")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if arguments.arch != "sm_75" else torch.float16
    weight, _ = cases.weights(N, K)
    dense = torch.randn(N, K, dtype=dtype)
    lora_a, lora_b = torch.randn(16, K, dtype=dtype), torch.randn(N, 16, dtype=dtype)

    def forward(m, *lora):
        return lambda: qlora.ops.forward(torch.randn(m, K, dtype=dtype), *weight, *lora)

    def backward(m):
        def call():
            torch.ops.qlora.backward(
                torch.randn(m, N, dtype=dtype), torch.randn(m, K, dtype=dtype), *weight, lora_a, lora_b, 1.0, None,
                True, True, False, False,
            )  # fmt: skip

        return call

    rows = {f"forward m={m}": forward(m) for m in (1, 8, 16, 64, 128)}
    rows |= {f"forward m={m} r=16": forward(m, lora_a, lora_b) for m in (1, 16, 128)}
    rows |= {"backward m=128 r=16": backward(128)}
    many_a, many_b = torch.randn(16, 16, K, dtype=dtype), torch.randn(16, N, 16, dtype=dtype)
    of_row = torch.arange(128) // 8
    rows |= {
        f"multi m={m} r=16": lambda m=m: qlora.ops.forward_multi(
            torch.randn(m, K, dtype=dtype), *weight, many_a, many_b, torch.ones(16), of_row[:m]
        )
        for m in (16, 128)
    }
    moments = torch.zeros(N, K), torch.zeros(N, K)
    rows |= {"adamw": lambda: qlora.ops.adamw(dense, dense, *moments, 1e-3, 0.9, 0.999, 1e-8, 0.01, 1)}
    codes = [torch.zeros(N, K, dtype=torch.uint8), torch.zeros(N * K // 256)] * 2
    rows |= {
        "adamw_8bit": lambda: qlora.ops.adamw_8bit(
            dense, dense, *(t.clone() for t in codes), 1e-3, 0.9, 0.999, 1e-8, 0.01, 1
        )
    }
    rows |= {"quantize": lambda: qlora.ops.quantize(dense)}
    rows |= {"dequantize": lambda: qlora.ops.dequantize(*weight, dtype)}
    # Experts of Qwen3-30B-A3B's gate_up, eight instead of 128: so many rows for each of them, eight rows for a token.
    mixture = 8, 1536, 2048
    parts = [cases.weights(*mixture[1:])[0] for _ in range(mixture[0])]
    stacked = [torch.stack([part[i] for part in parts]) for i in range(4)]
    of_experts = *stacked, list(mixture), *parts[0][5:]
    expert_a, expert_b = torch.randn(8, 16, 2048, dtype=dtype), torch.randn(8, 1536, 16, dtype=dtype)

    def experts(rows, *lora):
        return lambda: qlora.ops.forward_experts(
            torch.randn(rows, 2048, dtype=dtype), *of_experts, torch.arange(8 * rows) % 8, *lora
        )

    def experts_backward(rows):
        def call():
            torch.ops.qlora.backward.experts(
                torch.randn(8 * rows, 1536, dtype=dtype), torch.randn(rows, 2048, dtype=dtype), *of_experts,
                torch.arange(8 * rows) % 8, expert_a, expert_b, 1.0, True, True, False,
            )  # fmt: skip

        return call

    rows |= {f"experts {m} rows": experts(m) for m in (1, 4, 32, 128)}
    rows |= {f"experts {m} rows r=16": experts(m, expert_a, expert_b) for m in (4, 128)}
    rows |= {f"experts backward {m}": experts_backward(m) for m in (4, 128)}
    print(f"| call                   | {'kernel':<40} | insts/kw | mma/kw | sectors | conflicts |")
    for name, call in rows.items():
        if arguments.only in name:
            weights = N * K if "experts" not in name else mixture[0] * mixture[1] * mixture[2]
            run(name, call, arguments.arch, arguments.hot, arguments.sms, weights)


if __name__ == "__main__":
    main()
