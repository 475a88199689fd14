"""Serves training steps of Unsloth on a CPU to benchmarks/step.py: a line on stdin runs one, an answer says it is done.

Unsloth needs older transformers and TRL than qlora, so it has a Python of its own. The commands that make one are in
docs/notes/cpu-kernels.md. The model, the optimizer and the loss are those of Unsloth's own SFTTrainer on a CPU: fused
AdamW, and the cross entropy in chunks, which only that trainer switches on.
"""

import argparse
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Unsloth prints, also at import

import unsloth  # noqa: E402  before torch and transformers
from unsloth import FastLanguageModel  # noqa: E402

import torch  # noqa: E402  isort: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="folder with a model and its tokenizer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--tokens", type=int, required=True)
    arguments = parser.parse_args()
    model, _ = FastLanguageModel.from_pretrained(
        arguments.model,
        max_seq_length=arguments.tokens,
        dtype=getattr(torch, arguments.dtype),
        load_in_4bit=not arguments.dense,
        use_gradient_checkpointing=False,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, use_gradient_checkpointing=False).train()
    model.base_model.model._unsloth_cpu_chunked_ce_active = True
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.tokens))
    print(f"Unsloth {unsloth.__version__}", file=answers, flush=True)
    for _ in sys.stdin:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
