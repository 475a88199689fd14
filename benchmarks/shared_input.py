"""Times layers that share an input: one call of forward.many beside a call of forward for each layer.

Run: python benchmarks/shared_input.py [--tokens 1 16 128 512] [--dtype bf16] [--repeats 15]. Shapes are the projections
of SmolLM2-135M and Qwen3-0.6B; layers have an adapter of rank 16 in float32. With --model: whole models of SmolLM2's
shape with four blocks, without and with qlora.nn.share_inputs (needs the extra [train]). Both take turns in one
process; medians, and ratios of rounds with half the distance of their quartiles.
"""

import argparse
import copy
import statistics

import torch

import qlora
from qlora import ops
from qlora.bench.measure import alternate, median_ratio

CPU = torch.device("cpu")
GROUPS = {  # in_features, out_features of each layer
    "SmolLM2-135M q, k, v": (576, (576, 192, 192)),
    "SmolLM2-135M gate, up": (576, (1536, 1536)),
    "Qwen3-0.6B q, k, v": (1024, (2048, 1024, 1024)),
    "Qwen3-0.6B gate, up": (1024, (3072, 3072)),
}
COPIES = 4  # weights of as many blocks take turns, as in a model


class Block:
    """The layers of one group with one input."""

    def __init__(self, k: int, out_features: tuple[int, ...], rank: int) -> None:
        self.out_features = out_features
        self.weights = [qlora.quantize(torch.randn(n, k)) for n in out_features]
        self.a = [torch.randn(rank, k).div_(32).requires_grad_() for _ in out_features]
        self.b = [torch.randn(n, rank).div_(32).requires_grad_() for n in out_features]
        self.stacks = list(map(list, zip(*(w.tensors for w in self.weights), strict=True)))

    def many(self, x: torch.Tensor) -> list[torch.Tensor]:
        return ops.forward_many(x, *self.stacks, self.out_features, "nf4", 64, self.a, self.b)

    def separate(self, x: torch.Tensor) -> list[torch.Tensor]:
        every = zip(self.weights, self.a, self.b, strict=True)
        return [ops.forward(x, *w.arguments, a, b) for w, a, b in every]


def compare(name: str, m: int, work: str, contenders: dict, copies: int, repeats: int) -> None:
    """Times two contenders and prints a line."""
    times = alternate(contenders, CPU, copies, repeats)
    before, after = times.values()
    ratio, spread = median_ratio(after, before)
    ms = " ".join(f"{1e3 * statistics.median(seconds):8.3f}" for seconds in (before, after))
    print(f"{name:22} {m:5} {work:19} {ms} {ratio:6.2f} ± {spread / 2:.2f}", flush=True)


def compare_operators(options: argparse.Namespace, dtype: torch.dtype) -> None:
    for name, (k, out_features) in GROUPS.items():
        blocks = [Block(k, out_features, options.rank) for _ in range(COPIES)]
        for m in options.tokens:
            x = torch.randn(m, k, dtype=dtype)
            leaf = x.clone().requires_grad_()
            grads = [torch.randn(m, n, dtype=dtype) for n in out_features]

            def forward(how, x=x, blocks=blocks):
                def call(i):
                    with torch.no_grad():
                        getattr(blocks[i], how)(x)

                return call

            def both(how, leaf=leaf, grads=grads, blocks=blocks):
                return lambda i: torch.autograd.backward(getattr(blocks[i], how)(leaf), grads)

            for work, wrap in (("forward", forward), ("forward + backward", both)):
                contenders = {how: wrap(how) for how in ("separate", "many")}
                compare(name, m, work, contenders, COPIES, options.repeats)


def compare_models(options: argparse.Namespace, dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    separate = LlamaForCausalLM(config).to(dtype)
    qlora.prepare_model(separate, options.rank)
    grouped = copy.deepcopy(separate)
    qlora.nn.share_inputs(grouped)
    for m in options.tokens:
        tokens = torch.randint(0, 1024, (1, m))

        def forward(model, tokens=tokens):
            def call(_):
                with torch.no_grad():
                    model(input_ids=tokens, use_cache=False)

            return call

        def step(model, tokens=tokens):
            return lambda _: model(input_ids=tokens, labels=tokens).loss.backward()

        for work, wrap in (("forward", forward), ("forward + backward", step)):
            contenders = {"separate": wrap(separate), "grouped": wrap(grouped)}
            compare("four blocks", m, work, contenders, 1, options.repeats)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128, 512])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--model", action="store_true")
    options = parser.parse_args()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
    torch.manual_seed(0)
    print(f"{options.dtype} on {qlora._C.active_isa()}, {torch.get_num_threads()} threads; ms: separate, many, ratio")
    (compare_models if options.model else compare_operators)(options, dtype)


if __name__ == "__main__":
    main()
