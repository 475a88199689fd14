"""Fine-tunes a model with transformers, PEFT and TRL; the quantization config selects whose 4-bit layers it uses.

Run: python examples/finetune_trl.py (needs the extra [train], and trl). Without --model it takes SmolLM2-135M, and
the conversations that `qlora demo` trains on. `--quantizer bitsandbytes` is the same run on bitsandbytes' layers, and
`--quantizer accelerated` on bitsandbytes' layers with our kernels.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

import qlora  # registers QLoRAConfig with transformers, so it must come before from_pretrained


def quantization_config(name: str):
    if name == "qlora":
        return qlora.QLoRAConfig(quant_type="nf4", double_quant=True)
    if name == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def conversations(limit: int) -> Dataset:
    """The demo's prompts and answers, in TRL's format."""
    spec = importlib.util.find_spec("qlora.demo")
    lines = Path(spec.submodule_search_locations[0], "lighthouse.jsonl").read_text().splitlines()[:limit]
    rows = [json.loads(line) for line in lines]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": r["prompt"]}],
          "completion": [{"role": "assistant", "content": r["completion"]}]} for r in rows]
    )  # fmt: skip


class StepTimes(TrainerCallback):
    """Records the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self._begin = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder or id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--quantizer", choices=("qlora", "bitsandbytes", "accelerated", "none"), default="qlora")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--limit", type=int, default=200, help="conversations")
    parser.add_argument("--output", type=Path, default=Path("trl-adapter"))
    arguments = parser.parse_args()
    if arguments.model is None:
        from qlora.demo.smollm2 import smollm2_folder

        arguments.model = str(smollm2_folder())
    if arguments.quantizer == "accelerated":
        qlora.integrations.bitsandbytes.accelerate()

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=quantization_config(arguments.quantizer), dtype=torch.bfloat16
    )
    times = StepTimes()
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(arguments.output),
            max_steps=arguments.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=max(1, arguments.steps // 5),
            max_length=256,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=conversations(arguments.limit),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[times],
    )
    trainer.train()
    trainer.save_model(str(arguments.output))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    median = sorted(times.seconds)[len(times.seconds) // 2]
    print(f"{arguments.quantizer}: loss {losses[0]:.3f} -> {losses[-1]:.3f}, median step {median:.3f} s")


if __name__ == "__main__":
    main()
