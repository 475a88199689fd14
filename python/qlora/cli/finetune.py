"""``qlora finetune``: a model, a file of records, an output folder."""

import argparse
from dataclasses import fields, replace
from typing import Any

HELP = "fine-tune a causal language model in 4 bit; writes an adapter and a report"

# flag -> help; types and defaults are those of FinetuneSettings
_OPTIONS = {
    "eval_data": "records for evaluation (default: a part of --data)",
    "eval_fraction": "part of --data held out for evaluation",
    "rank": "rank of the adapters",
    "alpha": "scaling is alpha / rank (default: rank)",
    "dropout": "on the adapters' input",
    "quant_type": "nf4, fp4 or int4",
    "block_size": "weights per scale",
    "compute_dtype": "bf16 or fp32",
    "epochs": "passes over the data",
    "max_steps": "overrides --epochs",
    "batch_size": "rows per step",
    "gradient_accumulation": "steps per optimizer step",
    "max_length": "tokens per row",
    "learning_rate": "peak learning rate",
    "warmup_steps": "linear warm-up",
    "lr_scheduler": "a transformers scheduler name",
    "weight_decay": "of AdamW",
    "max_grad_norm": "gradient clipping",
    "save_steps": "steps between checkpoints",
    "eval_steps": "steps between evaluations",
    "logging_steps": "steps between loss records",
    "keep_checkpoints": "how many are kept",
    "seed": "of everything random",
}
_OPTIONAL_TYPES: dict[str, type] = {"eval_data": str, "alpha": float}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from qlora.training.settings import FinetuneSettings

    parser.add_argument("--model", help="folder or Hugging Face id (required unless --resume)")
    parser.add_argument("--data", help="JSON lines: messages, prompt/completion, or text (required unless --resume)")
    parser.add_argument("--output", required=True, help="folder for checkpoints, adapter and report; must not exist")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output with its own settings")
    parser.add_argument("--target-modules", nargs="+", help="layers with an adapter (default: all linear layers)")
    parser.add_argument("--no-double-quant", action="store_true", help="keep float32 scales")
    parser.add_argument("--no-packing", action="store_true", help="one record per row, padded")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory")
    parser.add_argument("--skip-bad", action="store_true", help="count malformed records instead of stopping")
    defaults = {field.name: field.default for field in fields(FinetuneSettings)}
    for name, text in _OPTIONS.items():
        default: Any = defaults[name]
        kind = _OPTIONAL_TYPES.get(name) or type(default)
        shown = "" if default is None or "default" in text else f" (default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text + shown)


def run(arguments: argparse.Namespace) -> int:
    from qlora.training.finetune import Interrupted, finetune, settings_of_run
    from qlora.training.settings import FinetuneSettings

    if arguments.resume:
        settings = replace(settings_of_run(arguments.output), output=arguments.output)
    else:
        missing = [flag for flag in ("model", "data") if getattr(arguments, flag) is None]
        if missing:
            raise ValueError(f"--{missing[0]} is required unless --resume is given")
        settings = FinetuneSettings(
            model=arguments.model,
            data=arguments.data,
            output=arguments.output,
            target_modules=tuple(arguments.target_modules) if arguments.target_modules else None,
            double_quant=not arguments.no_double_quant,
            packing=not arguments.no_packing,
            gradient_checkpointing=arguments.gradient_checkpointing,
            skip_bad=arguments.skip_bad,
            **{name: getattr(arguments, name) for name in _OPTIONS},
        )
    try:
        result = finetune(settings, resume=arguments.resume)
    except Interrupted as stop:
        resume = f"qlora finetune --output {arguments.output} --resume"
        raise KeyboardInterrupt(f"interrupted, {stop.checkpoint} is saved; continue with: {resume}") from stop
    if result.bad_records:
        print(f"{result.bad_records} malformed records were left out")
    if result.eval_loss_before is not None:
        print(f"evaluation loss {result.eval_loss_before:.3f} -> {result.eval_loss_after:.3f} in {result.steps} steps")
    print(f"adapter: {result.adapter}\nreport:  {settings.output}/report.png")
    return 0
