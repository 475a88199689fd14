"""Reinforcement learning (GRPO) on a 4-bit model by TRL: rollouts and training share one copy of the weights.

Run: python examples/train_grpo.py (needs the extra [train], and trl). Without --model it takes SmolLM2-135M. The rule
that gives rewards wants answers of --words words. Rollouts go through transformers' continuous batching on the same
quantized model, so no second engine and no copy of the weights is needed.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import qlora  # registers QLoRAConfig with transformers, so it must come before from_pretrained

QUESTIONS = [
    "What is a lighthouse?", "Why does the sea have tides?", "What do bees make?", "Who was Ada Lovelace?",
    "How do birds fly?", "What is a prime number?", "Why is the sky blue?", "What is bread made of?",
]  # fmt: skip


def prompts() -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": question}]} for question in QUESTIONS])


def brevity(words: int):
    """A reward of 1 for an answer of ``words`` words, and the ratio of the two lengths for any other."""

    def reward(completions: list, **kwargs: object) -> list[float]:
        lengths = [len(completion[0]["content"].split()) for completion in completions]
        return [min(length, words) / max(length, words) for length in lengths]

    return reward


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder or id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--words", type=int, default=10)
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--output", type=Path, default=Path("grpo-adapter"))
    arguments = parser.parse_args()
    if arguments.model is None:
        from qlora.demo.smollm2 import smollm2_folder

        arguments.model = str(smollm2_folder())

    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=qlora.QLoRAConfig(), dtype=dtype, device_map="cuda" if on_gpu else None
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=brevity(arguments.words),
        args=GRPOConfig(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            num_generations=8,
            max_completion_length=arguments.max_tokens,
            learning_rate=arguments.learning_rate,
            logging_steps=1,
            use_transformers_continuous_batching=True,
            # Room for 16 prompts with their answers; by default the cache takes half of the free memory.
            transformers_continuous_batching_config={"page_size": 32, "num_blocks": 128, "max_batch_tokens": 256},
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=not on_gpu,
            bf16=False,  # True would cast the adapter itself to bfloat16 at the first rollout
            disable_tqdm=True,
        ),
        train_dataset=prompts(),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(arguments.output))
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    (arguments.output / "rewards.json").write_text(json.dumps(rewards))
    for first in range(0, len(rewards), 5):
        mean = sum(rewards[first : first + 5]) / len(rewards[first : first + 5])
        print(f"steps {first + 1} to {min(first + 5, len(rewards))}: reward {mean:.3f} {'#' * round(40 * mean)}")


if __name__ == "__main__":
    main()
