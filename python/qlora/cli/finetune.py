"""``qlora finetune``: a model, a file of records, an output folder."""

import argparse
from dataclasses import fields
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
        # Suppressed: a resume can tell what was typed from what was not.
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text + shown)


def _typed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    typed: dict[str, Any] = {name: getattr(arguments, name) for name in _OPTIONS if hasattr(arguments, name)}
    for name in ("model", "data"):
        if getattr(arguments, name) is not None:
            typed[name] = getattr(arguments, name)
    if arguments.target_modules:
        typed["target_modules"] = tuple(arguments.target_modules)
    switches = {"double_quant": False, "packing": False, "gradient_checkpointing": True, "skip_bad": True}
    for name, value in switches.items():
        if getattr(arguments, name if value else f"no_{name}"):
            typed[name] = value
    return typed


def run(arguments: argparse.Namespace) -> int:
    from qlora.training.finetune import finetune, settings_of_run
    from qlora.training.settings import FinetuneSettings

    typed = _typed(arguments)
    if arguments.resume:
        settings = settings_of_run(arguments.output)
        changed = [name for name, value in typed.items() if getattr(settings, name) != value]
        if changed:
            name = changed[0]
            started = getattr(settings, name)
            raise ValueError(
                f"--{name.replace('_', '-')}={typed[name]!r}: the run in {arguments.output} was started with"
                f" {started!r}; --resume needs no other option"
            )
    else:
        missing = [name for name in ("model", "data") if name not in typed]
        if missing:
            raise ValueError(f"--{missing[0]} is required unless --resume is given")
        settings = FinetuneSettings(output=arguments.output, **typed)
    result = finetune(settings, resume=arguments.resume)
    records = result.records
    print(f"{records.train} records trained on, {records.evaluation} held out")
    for count, what in (
        (records.bad, "malformed and left out"),
        (records.cut, f"cut at {settings.max_length} tokens"),
        (records.dropped, f"left out: no completion within {settings.max_length} tokens"),
    ):
        if count:
            print(f"{count} records {what}")
    if result.eval_loss_before is not None:
        print(f"evaluation loss {result.eval_loss_before:.3f} -> {result.eval_loss_after:.3f} in {result.steps} steps")
    print(f"adapter: {result.adapter}\nreport:  {settings.output}/report.png")
    return 0
