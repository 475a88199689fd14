"""``qlora finetune``: fine-tunes a model on a file of records and writes to an output folder."""

import argparse
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

HELP = "fine-tune a causal language model in 4 bit; writes an adapter and a report"

# option -> help text; types and defaults come from FinetuneSettings
_OPTIONS = {
    "eval_data": "records for evaluation (default: a share of --data)",
    "eval_fraction": "share of --data held out for evaluation",
    "rank": "rank of the adapters",
    "alpha": "scaling is alpha / rank (default: rank)",
    "dropout": "dropout probability of the adapters' input",
    "quant_type": "nf4, fp4 or int4",
    "block_size": "weights per scale",
    "device": "auto (a GPU that can run the operators, else the CPU), cpu, cuda or cuda:N",
    "compute_dtype": "auto (the fast dtype of the device), bf16, fp16 or fp32",
    "optimizer": "adamw, adamw-8bit, paged-adamw or paged-adamw-8bit",
    "offload_experts": "ram or disk: where the experts of a mixture stay instead of on the device (default: nowhere)",
    "page_dir": "folder on disk for the paged optimizer state of a run on the CPU",
    "epochs": "passes over the data",
    "max_steps": "overrides --epochs",
    "batch_size": "rows per forward",
    "gradient_accumulation": "forwards per step; several processes share the rows of a step",
    "max_length": "tokens per row",
    "learning_rate": "peak learning rate",
    "warmup_steps": "linear warm-up",
    "lr_scheduler": "a transformers scheduler name",
    "weight_decay": "of AdamW",
    "max_grad_norm": "gradient clipping",
    "save_steps": "steps between checkpoints",
    "max_eval_records": "at most so many records are held out",
    "eval_steps": "steps between evaluations (default: a tenth of the run, at least 50)",
    "logging_steps": "steps between loss records",
    "keep_checkpoints": "number of checkpoints to keep",
    "seed": "seed of all random choices",
}
_OPTIONAL_TYPES: dict[str, type] = {
    **{"eval_data": str, "alpha": float, "page_dir": str, "offload_experts": str},
    **{"eval_steps": int, "max_eval_records": int},
}
_SWITCHES = {
    "no_double_quant": "keep float32 scales",
    "no_packing": "put one record in each row, with padding",
    "gradient_checkpointing": "recompute activations in the backward, to save memory",
    "skip_bad": "skip and count malformed records instead of stopping",
    "adapt_experts": "also train an adapter for each expert of a mixture (default: only linear layers)",
    "dora": "weight-decomposed adapters (DoRA)",
    "fsdp": "with several processes: shard the model with FSDP2 instead of copying it to each (DDP)",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from qlora.training.settings import FinetuneSettings

    parser.add_argument("--model", help="folder or Hugging Face id (required unless --resume)")
    parser.add_argument(
        "--data",
        help=".jsonl, .json, .csv, .parquet, or a data set of the Hub, OWNER/NAME[:SPLIT]: messages, prompt/completion,"
        " text, Alpaca or ShareGPT records (required unless --resume)",
    )
    parser.add_argument("--output", required=True, help="folder for checkpoints, adapter and report; must not exist")
    parser.add_argument("--resume", action="store_true", help="continue the run in --output with its own settings")
    parser.add_argument("--target-modules", nargs="+", help="layers with an adapter (default: all linear layers)")
    parser.add_argument("--modules-to-save", nargs="+", help="layers to train in full and save with the adapter")
    for name, text in _SWITCHES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="first calibrate the 4-bit base on --data and general text; keeps it in OUTPUT-base, to which the adapter"
        " belongs (default: no calibration)",
    )
    parser.add_argument(
        "--show-example", action="store_true", help="print the first record, with the learnt part in colour, and stop"
    )
    defaults = {field.name: field.default for field in fields(FinetuneSettings)}
    for name, text in _OPTIONS.items():
        default: Any = defaults[name]
        kind = _OPTIONAL_TYPES.get(name) or type(default)
        shown = "" if default is None or "default" in text else f" (default: {default})"
        # Without a default, so that a resumed run knows which options were given.
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS, help=text + shown)


def _typed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    typed: dict[str, Any] = {name: getattr(arguments, name) for name in _OPTIONS if hasattr(arguments, name)}
    for name in ("model", "data"):
        if getattr(arguments, name) is not None:
            typed[name] = getattr(arguments, name)
    for name in ("target_modules", "modules_to_save"):
        if getattr(arguments, name):
            typed[name] = tuple(getattr(arguments, name))
    for name in _SWITCHES:
        if getattr(arguments, name):
            typed[name.removeprefix("no_")] = not name.startswith("no_")
    return typed


def run(arguments: argparse.Namespace) -> int:
    from qlora.distributed import Processes
    from qlora.training.finetune import finetune
    from qlora.training.settings import FREE_SETTINGS, FinetuneSettings, settings_of_run

    typed = _typed(arguments)
    if arguments.resume and arguments.calibrate:
        raise ValueError("--calibrate makes the base of a new run: a resumed run keeps its own")
    if arguments.resume:
        settings = settings_of_run(arguments.output)
        settings = replace(settings, **{name: typed.pop(name) for name in FREE_SETTINGS if name in typed})
        changed = [name for name, value in typed.items() if getattr(settings, name) != value]
        if changed:
            name = changed[0]
            started = getattr(settings, name)
            raise ValueError(
                f"--{name.replace('_', '-')}={typed[name]!r}: the run in {arguments.output} was started with"
                f" {started!r}; --resume needs no other options (only --device, --fsdp,"
                " --offload-experts and --page-dir may change)"
            )
    else:
        missing = [name for name in ("model", "data") if name not in typed]
        if missing:
            raise ValueError(f"--{missing[0]} is required unless --resume is given")
        settings = FinetuneSettings(output=arguments.output, **typed)
        if arguments.calibrate and not arguments.show_example:
            settings = replace(settings, model=str(_calibrated_base(settings)))
    if arguments.show_example:
        return show_example(settings)
    result = finetune(settings, resume=arguments.resume, on_start=print)
    processes = Processes.of_environment()
    if not processes.is_writer:
        _leave()  # only the first process prints
    records = result.records
    print(f"{records.train} records trained on, {records.evaluation} held out")
    for count, what in (
        (records.bad, "malformed and skipped"),
        (records.cut, f"truncated at {settings.max_length} tokens"),
        (records.dropped, f"skipped: no completion within {settings.max_length} tokens"),
    ):
        if count:
            print(f"{count} records {what}")
    if result.eval_loss_before is not None:
        print(f"evaluation loss {result.eval_loss_before:.3f} -> {result.eval_loss_after:.3f} in {result.steps} steps")
    print(f"adapter: {result.adapter}\nreport:  {settings.output}/report.png")
    if processes.world > 1:
        _leave()
    return 0


def _calibrated_base(settings: Any) -> Path:
    """Writes the 4-bit base of a run, calibrated on its data; returns the folder."""
    from qlora.devices import choose_device
    from qlora.distributed import Processes
    from qlora.training.calibration_data import DEFAULT
    from qlora.training.quantizing import quantize_folder
    from qlora.training.settings import check_output

    if Processes.of_environment().world > 1:
        raise ValueError("--calibrate runs in one process: run qlora quantize first, and pass its folder as --model")
    settings.check()
    check_output(Path(settings.output), resume=False)
    base = Path(f"{settings.output.rstrip('/')}-base")
    if base.exists():
        raise FileExistsError(f"{base} exists: to train on it, pass --model {base} without --calibrate")
    print(f"calibrating the base on {settings.data} and general text")
    report = quantize_folder(
        settings.model,
        base,
        calibration=[settings.data, DEFAULT],
        skip_bad=settings.skip_bad,
        device=choose_device(settings.device).value,
        quant_type=settings.quant_type,
        block_size=settings.block_size,
        double_quant=settings.double_quant,
    )
    assert report is not None
    print(f"{base}: loss on other tokens {report.loss_before:.3f} (dense blocks) -> {report.loss_after:.3f} in 4 bit")
    return base


def _leave() -> None:
    """Exits at once if there are several processes; everything is saved by now.

    After FSDP2 the normal shutdown of torch's threads sometimes aborts, and the launcher would report a failed run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def show_example(settings: Any) -> int:
    """Prints the first record as tokens, with the learnt part in colour. Loads only the tokenizer."""
    from rich.console import Console
    from rich.text import Text

    from qlora.models.loading import load_tokenizer, require_train_extra, resolve_model
    from qlora.training.data import IGNORED, read_records, tokenize

    require_train_extra()
    tokenizer = load_tokenizer(resolve_model(settings.model))
    record = read_records(settings.data, settings.skip_bad)[0][0]
    example = tokenize(record.content, tokenizer)
    text = Text()
    for token, label in zip(example.input_ids, example.labels, strict=True):
        text.append(tokenizer.decode([token]), style="dim" if label == IGNORED else "bold green")
    learnt = sum(label != IGNORED for label in example.labels)
    console = Console()
    console.print(text)
    console.print(
        f"{record.place}: {learnt} of {len(example.labels)} tokens are learnt (in colour); nothing was trained"
    )
    return 0
