"""Times the same user code on different 4-bit layers: steps with transformers and PEFT, and bitsandbytes' calls.

Run: python benchmarks/ecosystem.py [step] [calls] [--repeats 5] (needs the extra [bench]). Contenders take turns in one
process; medians, and ratios of rounds with half the distance of their quartiles.
"""

import argparse
import statistics
import tempfile

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import qlora
from qlora.bench.measure import alternate, median_ratio
from qlora.bench.step import SMOLLM2
from qlora.integrations.bitsandbytes import accelerate

CPU = torch.device("cpu")


def accelerated(call):
    """``call`` on bitsandbytes' layers with qlora's kernels."""

    def run(i: int) -> None:
        with accelerate():
            call(i)

    return run


def step(tokens: int):
    """A training step of a model of SmolLM2-135M's shape with rank-16 LoRA on all linear layers, for each config."""
    folder = tempfile.mkdtemp()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig.from_dict(SMOLLM2), dtype=torch.bfloat16).save_pretrained(folder)
    theirs = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    ids = torch.randint(0, SMOLLM2["vocab_size"], (1, tokens))

    def contender(config):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run(_: int) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    on_bitsandbytes = contender(theirs)
    return {
        "qlora": contender(qlora.QLoRAConfig()),
        "dense bf16": contender(None),
        "bitsandbytes": on_bitsandbytes,
        "bitsandbytes, accelerated": accelerated(on_bitsandbytes),
    }


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
    parser.add_argument("work", nargs="*", default=["step", "calls"], help="step, calls")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if "step" in arguments.work:
        table = Table(title="Step through transformers + PEFT, 512 tokens", title_justify="left")
        for column in ("layers", "median s", "qlora ÷ it"):
            table.add_column(column)
        times = alternate(step(512), CPU, 1, arguments.repeats)
        for name, seconds in times.items():
            ratio, spread = median_ratio(times["qlora"], seconds)
            table.add_row(name, f"{statistics.median(seconds):.3f}", f"{ratio:.2f} ± {spread / 2:.2f}")
        Console(width=100).print(table)
    if "calls" in arguments.work:
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
