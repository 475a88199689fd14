"""``qlora demo``: fine-tunes SmolLM2-135M in 4 bit on records in a distinctive style, and shows the difference."""

import argparse
import shutil
import time
from pathlib import Path

from qlora.cli import choices

HELP = "fine-tune SmolLM2-135M on a small data set and compare before and after"

DATA = Path(__file__).parents[1] / "demo" / "lighthouse.jsonl"
MARKER = ".qlora-demo"
PROMPTS = (
    "How do I keep bread fresh for longer?",
    "Why is the sky blue?",
    "Give me one tip for learning a new language.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder; an older demo is replaced")
    parser.add_argument("--epochs", type=float, default=2.0)
    choices.add_arguments(parser)


def _replace_older_demo(output: Path) -> None:
    """Creates an empty folder. Deletes an existing one only if it contains the demo's marker file."""
    if output.exists():
        if any(output.iterdir()) and not (output / MARKER).exists():
            raise FileExistsError(f"{output} exists and is not an older demo: choose another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).write_text("Made by qlora demo, which replaces this folder when it runs again.\n")


def run(arguments: argparse.Namespace) -> int:
    from qlora.models.loading import require_train_extra

    require_train_extra()
    from rich.console import Console
    from rich.table import Table

    from qlora.demo.smollm2 import smollm2_folder
    from qlora.models.loading import chat_reply, load_for_inference
    from qlora.training.finetune import finetune
    from qlora.training.memory import MIB, peak_memory
    from qlora.training.settings import FinetuneSettings

    begin = time.perf_counter()
    console = Console()
    console.rule("1/4 The model")
    folder = smollm2_folder()
    console.print(f"SmolLM2-135M-Instruct in {folder} (Apache-2.0; its published weights are already Q4_1)")
    _replace_older_demo(arguments.output)

    console.rule("2/4 Before: three prompts in 4 bit, no adapter")
    device, dtype = choices.chosen(arguments)
    model, tokenizer = load_for_inference(folder, None, dtype, device)
    before = [chat_reply(model, tokenizer, prompt) for prompt in PROMPTS]
    del model

    console.rule("3/4 Fine-tuning on 240 records in the voice of a lighthouse keeper")
    result = finetune(
        FinetuneSettings(
            model=str(folder),
            data=str(DATA),
            output=str(arguments.output / "run"),
            epochs=arguments.epochs,
            learning_rate=1e-3,
            warmup_steps=5,
            eval_steps=25,
            device=arguments.device,
            compute_dtype=arguments.compute_dtype,
        )
    )
    after = [chat_reply(result.model, result.tokenizer, prompt) for prompt in PROMPTS]

    console.rule("4/4 Result")
    sizes = Table("weights", "MiB", title="Bytes")
    sizes.add_row(f"whole model in {str(dtype).removeprefix('torch.')}", f"{result.bytes_dense / MIB:.1f}")
    sizes.add_row("whole model, linear layers in 4 bit", f"{result.bytes_now / MIB:.1f}")
    console.print(sizes)
    loss = Table("evaluation loss (nats per token, mean over batches)", "", title="24 records never trained on")
    loss.add_row("before", f"{result.eval_loss_before:.3f}")
    loss.add_row("after", f"{result.eval_loss_after:.3f}")
    console.print(loss)
    answers = Table("prompt", "before", "after", title="The same prompts", show_lines=True)
    for row in zip(PROMPTS, before, after, strict=True):
        answers.add_row(*row)
    console.print(answers)
    console.print(
        f"{time.perf_counter() - begin:.0f} s on {device} in {str(dtype).removeprefix('torch.')}, peak memory"
        f" {peak_memory(device) / MIB:.0f} MiB; report: {arguments.output}/run/report.png"
    )
    console.print(
        f"Try it: qlora generate --model {folder} --adapter {result.adapter} --prompt 'What is a black hole?'"
    )
    return 0
