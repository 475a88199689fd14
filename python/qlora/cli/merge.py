"""``qlora merge``: merges an adapter into its 4-bit base and writes a dense 16-bit model, or one in 4 bit again."""

import argparse
from pathlib import Path
from typing import Any

_BITSANDBYTES = "bitsandbytes"

HELP = "merge an adapter into its base; writes a model folder for transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of the base")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, from qlora finetune or PEFT")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model; must not exist")
    parser.add_argument(
        "--format",
        default="bf16",
        help="bf16 (default, dense); the base's 4-bit format, for qlora: nf4, fp4 or int4; or bitsandbytes, the same"
        " 4-bit weights in a folder for bitsandbytes",
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
        raise ValueError(
            "--calibrate needs --format nf4, fp4, int4 or bitsandbytes: a dense model has no codes to choose"
        )
    import torch

    import qlora
    from qlora.adapters.merge_report import REPORT_FILE, report_of, summary_of
    from qlora.calibration.texts import UNSEEN_TOKENS
    from qlora.devices import choose_device
    from qlora.models.loading import load_for_inference, require_train_extra
    from qlora.storage.files import complete_folder

    require_train_extra()
    if requantize and arguments.format not in (*qlora.ops.QUANT_TYPES, _BITSANDBYTES):
        known = ", ".join(("bf16", *qlora.ops.QUANT_TYPES, _BITSANDBYTES))
        raise ValueError(f"--format '{arguments.format}' is unknown: use one of {known}")
    device = choose_device(arguments.device).value
    adapted, tokenizer = load_for_inference(arguments.model, arguments.adapter, torch.bfloat16, device)
    if requantize:
        _check_format(adapted, arguments.format)
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
        if arguments.format == _BITSANDBYTES:
            from qlora.integrations.bitsandbytes import export_checkpoint

            export_checkpoint(model, staging, dense_experts=True)
        else:
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / REPORT_FILE).write_text(report_of(merged))
    print(summary_of(merged))
    print(f"report: {arguments.output}/{REPORT_FILE}")
    print(f"model: {arguments.output}")
    return 0


def _check_format(model: Any, wanted: str) -> None:
    """Raises ValueError unless the base is in the 4-bit format ``wanted``, or in one that bitsandbytes has."""
    import qlora

    stored = {m.quant_type for m in model.modules() if isinstance(m, qlora.nn.Linear4bit)}
    allowed = {"nf4", "fp4"} if wanted == _BITSANDBYTES else {wanted}
    if len(stored) != 1 or not stored <= allowed:
        raise ValueError(f"--format {wanted}: the base is in {', '.join(sorted(stored))}, use that")
