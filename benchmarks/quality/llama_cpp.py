"""Compares greedy answers of a fine-tuned model here and in llama.cpp: merged file, base file, base file with LoRA.

    python benchmarks/quality/llama_cpp.py BASE ADAPTER [--tokens 40] [--types f32 f16 q8_0]

It needs the package xllamacpp. For each file and type it prints the prompts whose answers are equal, token by token,
and for each other prompt the first token that differs, with how much more probable the chosen token was here than
llama.cpp's choice (nats). Both compute in float32 with float32 keys and values, from the weights in the file.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from qlora.export.gguf_adapter import export_gguf_adapter
from qlora.export.gguf_model import export_gguf
from qlora.models.loading import load_for_inference

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from export.llama_cpp import LlamaCpp

PROMPTS = (
    "How do I keep bread fresh?",
    "What is the capital of France?",
    "Explain what a tide is.",
    "Write a short poem about the sea.",
    "How many days are there in a leap year?",
    "Name three fruits that are red.",
    "Why is the sky blue?",
    "Give me a tip for sleeping better.",
    "What does a lighthouse do?",
    "Translate 'good morning' into Spanish.",
)


@torch.inference_mode()
def greedy(model: torch.nn.Module, ids: list[int], count: int, end: int) -> tuple[list[int], torch.Tensor]:
    """The tokens of a greedy answer, and the log-probabilities of all tokens at each step."""
    output = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=end,
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = torch.stack(output.logits).squeeze(1).float().log_softmax(-1)
    return output.sequences[0, len(ids) :].tolist(), steps


def compare(ours: list[int], steps: torch.Tensor, theirs: list[dict[int, float]], end: int) -> tuple[int, float, float]:
    """(equal tokens, gap at the first difference or 0, largest error of a log-probability before it)."""
    ours = ours[: ours.index(end)] if end in ours else ours
    worst = 0.0
    for i, token in enumerate(ours):
        if i >= len(theirs):
            return i, float("nan"), worst
        found = next(iter(theirs[i]))
        worst = max(worst, *(abs(p - steps[i, id_].item()) for id_, p in theirs[i].items()))
        if found != token:
            return i, (steps[i, token] - steps[i, found]).item(), worst
    return len(ours), 0.0, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "q8_0"])
    arguments = parser.parse_args()
    model, tokenizer = load_for_inference(arguments.base, arguments.adapter, torch.float32)
    end = tokenizer.eos_token_id
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in PROMPTS
    ]
    tuned = [greedy(model, ids, arguments.tokens, end) for ids in prompts]
    with model.disable_adapter():
        plain = [greedy(model, ids, arguments.tokens, end) for ids in prompts]
    changed = sum(a[0] != b[0] for a, b in zip(tuned, plain, strict=True))
    print(f"the adapter changes {changed} of {len(prompts)} answers, e.g. {tokenizer.decode(tuned[0][0])!r}")
    print("| file | type | MB | equal answers | first differences (token, gap in nats) | largest error (nats) |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        lora, _, _ = export_gguf_adapter(arguments.adapter, folder / "lora.gguf", model=arguments.base)
        for kind in arguments.types:
            files = {
                "merged": (folder / f"merged-{kind}.gguf", {"adapter": arguments.adapter}, None, tuned),
                "base": (folder / f"base-{kind}.gguf", {"adapter": arguments.adapter, "base_only": True}, None, plain),
            }
            for path, options, _, _ in files.values():
                export_gguf(arguments.base, path, tensor_type=kind, **options)
            files["base + LoRA"] = (files["base"][0], {}, lora, tuned)
            for name, (path, _, adapter, answers) in files.items():
                size = path.stat().st_size + (lora.stat().st_size if adapter else 0)
                with LlamaCpp(path, adapter, context=512) as runtime:
                    results = [
                        compare(*answer, runtime.greedy(ids, arguments.tokens), end)
                        for ids, answer in zip(prompts, answers, strict=True)
                    ]
                total = [min(len(answer[0]), arguments.tokens) for answer in answers]
                differ = [f"{n}/{t}, {gap:.4f}" for (n, gap, _), t in zip(results, total, strict=True) if gap != 0]
                worst = max(error for _, _, error in results)
                print(
                    f"| {name} | {kind} | {size / 1e6:.0f} | {len(prompts) - len(differ)} of {len(prompts)} |"
                    f" {'; '.join(differ) or '–'} | {worst:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
