"""Compares qlora on a GPU with torch and bitsandbytes: products, host time of a call, and Llama-3-8B layers with LoRA.

Run: python benchmarks/gpu.py [products] [host] [layers]. It needs a GPU, for layers also transformers and PEFT;
bitsandbytes is included if it is installed. Products are medians of five CUDA graph replays over weights that rotate to
exceed L2. Layers are synchronized eager steps, with contenders in turn. docs/notes/gpu-runs.md has results.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import qlora
from qlora import ops

try:
    import bitsandbytes as bnb
except ImportError:
    bnb = None

CUDA, BF16 = torch.device("cuda"), torch.bfloat16
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
RANK = 16
MILLISECONDS = 12  # minimum duration of a timing
LLAMA_3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def replayed(call: Callable[[int], Any], copies: int) -> float:
    """Microseconds per ``call(i)``, with i = 0 … copies - 1 captured in one graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(2, copies)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(copies)]
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    run(1)
    times = max(1, int(MILLISECONDS / 5 / max(run(1), 1e-3)))
    result = statistics.median(run(times) / times / copies * 1e3 for _ in range(5))
    del kept
    return result


def products(n: int, k: int) -> None:
    """Prints a table row per contender: its microseconds for each number of tokens."""
    l2 = torch.cuda.get_device_properties(CUDA).L2_cache_size
    copies = max(2, min(24, 3 * l2 // (n * k // 2) + 1))
    packed = [qlora.quantize(torch.randn(n, k, device=CUDA)) for _ in range(copies)]
    dense = [w.dequantize(BF16) for w in packed[: max(2, min(copies, (3 << 30) // (2 * n * k)))]]
    a, b = torch.randn(RANK, k, device=CUDA), torch.randn(n, RANK, device=CUDA)
    a16, b16 = a.to(BF16), b.to(BF16)
    theirs = [bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense] if bnb else []
    table: dict[str, list[float]] = {}
    for m in TOKENS:
        x, grad = torch.randn(m, k, device=CUDA, dtype=BF16), torch.randn(m, n, device=CUDA, dtype=BF16)

        def forward(i: int, *lora: Any, x: Any = x) -> Any:
            return ops.forward(x, *packed[i].arguments, *lora)

        def backward(i: int, *lora: Any, x: Any = x, grad: Any = grad) -> Any:
            needs = (True, len(lora) > 0, False, False)
            adapter = lora or (None, None, 1.0)
            return torch.ops.qlora.backward(grad, x, *packed[i].arguments, *adapter, None, *needs)

        def dense_lora(i: int, x: Any = x) -> Any:
            return F.linear(x, dense[i]) + F.linear(F.linear(x, a16), b16)

        contenders: dict[str, tuple[Callable[[int], Any], int]] = {
            "dense bf16": (lambda i, x=x: F.linear(x, dense[i]), len(dense)),
            "dense bf16 + LoRA in bf16": (dense_lora, len(dense)),
            "qlora": (forward, copies),
            "qlora + LoRA in float32": (lambda i: forward(i, a, b, 0.5), copies),
            "dense dx": (lambda i, grad=grad: grad @ dense[i], len(dense)),
            "qlora dx": (backward, copies),
            "qlora backward, LoRA in float32": (lambda i: backward(i, a, b, 0.5), copies),
        }
        if theirs:
            contenders["bitsandbytes"] = (
                lambda i, x=x: bnb.matmul_4bit(x, theirs[i][0].t(), theirs[i][1]),
                len(theirs),
            )
        most = max(1, (2 << 30) // (2 * m * max(n, k)))  # a graph keeps its results alive
        with torch.no_grad():
            for name, (call, count) in contenders.items():
                table.setdefault(name, []).append(replayed(call, min(count, most)))
    print(f"\n{n} x {k}, microseconds for tokens {', '.join(map(str, TOKENS))}")
    for name, row in table.items():
        print(f"{name:34}" + " ".join(f"{us:8.2f}" for us in row))


def host() -> None:
    """Prints host microseconds of eager calls, without waiting for the GPU."""
    n = k = 4096
    w = qlora.quantize(torch.randn(n, k, device=CUDA))
    dense, a, b = w.dequantize(BF16), torch.randn(RANK, k, device=CUDA), torch.randn(n, RANK, device=CUDA)
    x, x64, grad = (torch.randn(m, c, device=CUDA, dtype=BF16) for m, c in ((1, k), (64, k), (64, n)))
    weight = (*w.tensors, [n, k], "nf4", 64)
    calls = {
        "F.linear": lambda: F.linear(x, dense),
        "forward": lambda: ops.forward(x, *weight),
        "forward + LoRA": lambda: ops.forward(x, *weight, a, b, 0.5),
        "backward + LoRA, 64 tokens": lambda: torch.ops.qlora.backward(
            grad, x64, *weight, a, b, 0.5, None, True, True, False, False
        ),
    }
    with torch.no_grad():
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            rounds = []
            for _ in range(9):
                start = time.perf_counter()
                for _ in range(100):
                    call()
                rounds.append((time.perf_counter() - start) / 100 * 1e6)
            torch.cuda.synchronize()
            print(f"host {name:34}{statistics.median(rounds):8.1f} us")


def layers(count: int = 4) -> None:
    """Prints times of forward plus backward, and of forward alone, for Llama-3-8B layers with PEFT's rank-16 LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    folder = Path(tempfile.mkdtemp())
    torch.set_default_dtype(BF16)
    with CUDA:
        LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_hidden_layers=count, **LLAMA_3_8B)).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    configs: dict[str, Any] = {"qlora": qlora.QLoRAConfig(), "dense bf16": None}
    if bnb:
        configs["bitsandbytes"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=BF16,
        )
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    models = {}
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=BF16, device_map={"": CUDA}
        )
        models[name] = get_peft_model(model, lora)
    trained = {name: [p for p in m.parameters() if p.requires_grad] for name, m in models.items()}

    def step(name: str, ids: Any) -> None:
        models[name](input_ids=ids, labels=ids).loss.backward()
        for parameter in trained[name]:
            parameter.grad = None

    @torch.no_grad()
    def forward(name: str, ids: Any) -> None:
        models[name](input_ids=ids)

    for what, work, tokens, rounds in (
        ("forward + backward", step, (256, 512, 1024, 2048, 4096, 8192), 5),
        ("forward", forward, (1, 16), 12),
    ):
        for m in tokens:
            ids = torch.randint(0, 1000, (1, m), device=CUDA)
            times: dict[str, list[float]] = {name: [] for name in models}
            peaks = dict.fromkeys(models, 0)
            for _, name in itertools.product(range(rounds), models):
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
                start = time.perf_counter()
                work(name, ids)
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
                peaks[name] = (torch.cuda.max_memory_allocated() - before) >> 20
            text = ", ".join(
                f"{name} {statistics.median(t[2:]) * 1e3:.2f} ms, +{peaks[name]} MiB" for name, t in times.items()
            )
            print(f"{count} layers, {what}, {m} tokens: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="products, host, layers (default: all)")
    parts = parser.parse_args().parts or ["products", "host", "layers"]
    print(torch.__version__, torch.cuda.get_device_name())
    if "products" in parts:
        for n, k in SHAPES:
            products(n, k)
    if "host" in parts:
        host()
    if "layers" in parts:
        layers()


if __name__ == "__main__":
    main()
