"""Times one mixture layer: qlora's grouped operator, a loop over experts, dense experts and bitsandbytes' layers.

Run: python benchmarks/experts.py [--tokens 1 16 512 2048] [--dtype bf16] [--repeats 5] (needs the extra [bench]).
The layer has the shape of Qwen3-30B-A3B's unless options say otherwise. Contenders take turns in one process; medians,
and ratios of rounds with half the distance of their quartiles. Adapters have rank 16 for each expert; the dense experts
have none, since PEFT would add a dense delta of all experts to their weights in every call.
"""

import argparse
import statistics

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from qlora import ops
from qlora.bench.measure import alternate, median_ratio
from qlora.nn import Experts4bit

CPU = torch.device("cpu")
WEIGHTS = ("gate_up_proj", "down_proj")


def loop_over_experts(projection, activate, hidden, index, weights, experts):
    """The sum over each token's experts as most code computes it: one call of ``projection(name, expert, x)`` each."""
    out = torch.zeros_like(hidden)
    chosen = index.flatten()
    order = chosen.argsort(stable=True)
    counts = torch.bincount(chosen, minlength=experts).tolist()
    for expert, places in enumerate(order.split(counts)):
        if places.numel() == 0:
            continue
        tokens = places // index.shape[-1]
        inner = activate(projection("gate_up_proj", expert, hidden[tokens]))
        result = projection("down_proj", expert, inner) * weights.flatten()[places, None]
        out.index_add_(0, tokens, result.to(out.dtype))
    return out


def contenders(options, dtype):
    """Functions (hidden, index, weights, with_adapters) -> out, by name."""
    config = Qwen3MoeConfig(
        hidden_size=options.hidden,
        moe_intermediate_size=options.expert,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
    )
    config._experts_implementation = "eager"
    dense = Qwen3MoeExperts(config).to(dtype).requires_grad_(False)
    for name in WEIGHTS:
        nn.init.normal_(getattr(dense, name), std=0.02)
    ours = Experts4bit.from_experts(dense)
    factors = {}
    for name in WEIGHTS:
        experts, n, k = getattr(dense, name).shape
        a, b = torch.randn(experts, options.rank, k) / 32, torch.randn(experts, n, options.rank) / 32
        factors[name] = (a.requires_grad_(), b.requires_grad_(), 1.0)

    def grouped(hidden, index, weights, with_adapters):
        ours.low_rank = factors if with_adapters else {}
        return ours(hidden, index, weights)

    def loop(hidden, index, weights, with_adapters):
        def projection(name, expert, x):
            a, b, scaling = factors[name]
            adapter = (a[expert], b[expert], scaling) if with_adapters else ()
            return ops.forward(x, *ours.expert(name, expert).arguments, *adapter)

        return loop_over_experts(projection, dense._apply_gate, hidden, index, weights, options.experts)

    def dense_grouped(hidden, index, weights, with_adapters):
        return grouped_mm_experts_forward(dense, hidden, index, weights)

    made = {"qlora": grouped, "loop over experts": loop, "dense, grouped": dense_grouped}
    if options.bitsandbytes:
        made["bitsandbytes, loop"] = bitsandbytes_loop(dense, dtype, options.experts)
    return made


def bitsandbytes_loop(dense, dtype, experts):
    import bitsandbytes as bnb

    def layer(weight):
        linear = bnb.nn.Linear4bit(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            compute_dtype=dtype,
            quant_type="nf4",
            compress_statistics=True,
        )
        linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        return linear.to("cpu").train()

    layers = {name: [layer(weight) for weight in getattr(dense, name)] for name in WEIGHTS}

    def run(hidden, index, weights, with_adapters):
        return loop_over_experts(
            lambda name, expert, x: layers[name][expert](x), dense._apply_gate, hidden, index, weights, experts
        )

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 2048])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--expert", type=int, default=768, help="width of an expert")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-bitsandbytes", dest="bitsandbytes", action="store_false")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    torch.manual_seed(0)
    made = contenders(options, dtype)
    table = Table(title=f"One mixture layer, {options.dtype}", title_justify="left")
    for column in ("tokens", "work", "layer", "median ms", "qlora ÷ it"):
        table.add_column(column)
    for tokens in options.tokens:
        hidden = torch.randn(tokens, options.hidden, dtype=dtype)
        scores = torch.randn(tokens, options.experts).softmax(1)
        weights, index = scores.topk(options.top_k, 1)
        weights, grad = (weights / weights.sum(1, keepdim=True)).to(dtype), torch.randn_like(hidden)

        def forward(run, hidden=hidden, index=index, weights=weights):
            def call(_):
                with torch.no_grad():
                    run(hidden, index, weights, False)

            return call

        def both(run, hidden=hidden, index=index, weights=weights, grad=grad):
            leaf = hidden.clone().requires_grad_()

            def call(_):
                run(leaf, index, weights, True).backward(grad)

            return call

        for work, wrap in (("forward", forward), ("forward + backward", both)):
            times = alternate({name: wrap(run) for name, run in made.items()}, CPU, 1, options.repeats)
            for name, seconds in times.items():
                ratio, spread = median_ratio(times["qlora"], seconds)
                table.add_row(
                    str(tokens),
                    work,
                    name,
                    f"{1e3 * statistics.median(seconds):.2f}",
                    f"{ratio:.2f} ± {spread / 2:.2f}",
                )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
