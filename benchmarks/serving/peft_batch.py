"""PEFT's own way to mix adapters: one static batch with adapter_names, by generate(), in tokens per second.

Compare with benchmarks/serving/load.py. `--base dense` is a float32 model with PEFT's layers, `--base 4bit` the same
model with qlora's.

    python benchmarks/serving/peft_batch.py --model FOLDER --adapters runs/*/adapter --batch 16 64
"""

import argparse
import time

import torch
from load import PROMPTS
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapters", nargs="+", required=True, help="adapter folders")
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--base", choices=("dense", "4bit"), default="dense")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
    config = qlora.QLoRAConfig() if arguments.base == "4bit" else None
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), quantization_config=config
    )
    names = [f"a{i}" for i in range(len(arguments.adapters))]
    model = PeftModel.from_pretrained(model, arguments.adapters[0], adapter_name=names[0])
    for name, folder in zip(names[1:], arguments.adapters[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    model.eval()
    for batch in arguments.batch:
        messages = [[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}] for i in range(batch)]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )
        of_sample = [names[i % len(names)] for i in range(batch)]
        rates = []
        for _ in range(arguments.repeat):
            begun = time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    **inputs, adapter_names=of_sample, max_new_tokens=arguments.max_tokens, do_sample=False
                )
            new = out[:, inputs["input_ids"].shape[1] :]
            tokens = int((new != tokenizer.pad_token_id).sum())
            rates.append(tokens / (time.perf_counter() - begun))
        print(
            f"{arguments.base} {arguments.dtype}, {len(names)} adapters, batch {batch}: {max(rates):.1f} tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
