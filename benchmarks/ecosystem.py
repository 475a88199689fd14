"""Times bitsandbytes' Linear4bit in training mode, before and after `accelerate()`. benchmarks/step.py has the step.

Run: python benchmarks/ecosystem.py [--repeats 5] (needs the extra [bench]). Contenders take turns in one process;
medians, and ratios of rounds with half the distance of their quartiles.
"""

import argparse
import statistics

import bitsandbytes as bnb
import torch
from rich.console import Console
from rich.table import Table

from qlora.bench.measure import alternate, median_ratio
from qlora.integrations.bitsandbytes import accelerate

CPU = torch.device("cpu")


def accelerated(call):
    """``call`` on bitsandbytes' layers with qlora's kernels."""

    def run(i: int) -> None:
        with accelerate():
            call(i)

    return run


def calls(m: int, n: int = 4096, k: int = 4096):
    """Forward, and forward plus backward, of bitsandbytes' Linear4bit in training mode."""
    layers = []
    for _ in range(4):
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        layers.append(layer.to("cpu").train())
    x = torch.randn(m, k, dtype=torch.bfloat16)
    leaf = x.clone().requires_grad_()
    grad = torch.randn(m, n, dtype=torch.bfloat16)

    def forward(i: int) -> None:
        with torch.no_grad():
            layers[i](x)

    def both(i: int) -> None:
        layers[i](leaf).backward(grad)

    return {"forward": forward, "forward + backward": both}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    table = Table(title="bitsandbytes' Linear4bit 4096 x 4096, bf16, nf4", title_justify="left")
    for column in ("call", "tokens", "before ms", "accelerated ms", "after ÷ before"):
        table.add_column(column)
    for m in (1, 16, 64, 512):
        for name, call in calls(m).items():
            times = alternate({"before": call, "after": accelerated(call)}, CPU, 4, arguments.repeats)
            ratio, spread = median_ratio(times["after"], times["before"])
            before, after = (f"{1e3 * statistics.median(times[key]):.2f}" for key in ("before", "after"))
            table.add_row(name, str(m), before, after, f"{ratio:.3f} ± {spread / 2:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
