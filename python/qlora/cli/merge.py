"""``qlora merge``: merges an adapter into its 4-bit base and writes a dense 16-bit model, or one in 4 bit again."""

import argparse
from pathlib import Path
from typing import Any

HELP = "merge an adapter into its base; writes a model folder for transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of the base")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, from qlora finetune or PEFT")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model; must not exist")
    parser.add_argument(
        "--format", default="bf16", help="bf16 (default, dense), or the base's 4-bit format: nf4, fp4 or int4"
    )
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        nargs="+",
        help="with a 4-bit format: text as for qlora quantize, best the training data; without it, rounding undoes most"
        " of the adapter",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens for calibration (default: 16384)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output.exists():
        raise FileExistsError(f"{arguments.output} exists: choose another output")
    requantize = arguments.format != "bf16"
    if arguments.calibrate is not None and not requantize:
        raise ValueError("--calibrate needs --format nf4, fp4 or int4: a dense model has no codes to choose")
    import torch

    import qlora
    from qlora.calibration.texts import UNSEEN_TOKENS
    from qlora.devices import choose_device
    from qlora.models.loading import load_for_inference, require_train_extra
    from qlora.storage.files import complete_folder

    require_train_extra()
    if requantize and arguments.format not in qlora.ops.QUANT_TYPES:
        raise ValueError(f"--format '{arguments.format}' is unknown: use bf16, {', '.join(qlora.ops.QUANT_TYPES)}")
    device = choose_device(arguments.device).value
    adapted, tokenizer = load_for_inference(arguments.model, arguments.adapter, torch.bfloat16, device)
    if requantize:
        stored = {m.quant_type for m in adapted.modules() if isinstance(m, qlora.nn.Linear4bit)}
        if stored != {arguments.format}:
            raise ValueError(f"--format {arguments.format}: the base is in {', '.join(sorted(stored))}, use that")
        ids = None
        if arguments.calibrate is not None:
            from qlora.training.calibration_data import calibration_ids

            ids = calibration_ids(arguments.calibrate, tokenizer, arguments.tokens + UNSEEN_TOKENS)
        options = {"calibration": ids, "tokenizer": tokenizer, "tokens": arguments.tokens}
        merged = qlora.merge_and_unload(adapted, requantize=True, **options)
    else:
        merged = qlora.merge_and_unload(adapted, dtype=torch.bfloat16)
    model: Any = merged.model
    with complete_folder(arguments.output) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    worst = max(merged.reports.values(), key=lambda report: report.relative_error)
    print(
        f"{len(merged.reports)} layers merged to {worst.format}; rounding adds at most {worst.relative_error:.1e}"
        f" (relative), {merged.adapter_kept:.0%} of the adapter is kept"
    )
    print(f"model: {arguments.output}")
    return 0
