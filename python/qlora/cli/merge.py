"""``qlora merge``: merges an adapter into its 4-bit base and writes a dense 16-bit model."""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

HELP = "merge an adapter into its base; writes a dense model folder for transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of the base")
    parser.add_argument("--adapter", type=Path, required=True, help="adapter folder, from qlora finetune or PEFT")
    parser.add_argument("--output", type=Path, required=True, help="folder for the merged model; must not exist")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(arguments: argparse.Namespace) -> int:
    if arguments.output.exists():
        raise FileExistsError(f"{arguments.output} exists: choose another output")
    import torch

    import qlora
    from qlora.devices import choose_device
    from qlora.models.loading import load_for_inference, require_train_extra

    require_train_extra()
    from safetensors import SafetensorError

    device = choose_device(arguments.device).value
    adapted, tokenizer = load_for_inference(arguments.model, arguments.adapter, torch.bfloat16, device)
    merged = qlora.merge_and_unload(adapted, dtype=torch.bfloat16)
    model: Any = merged.model
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{arguments.output.name}.", dir=arguments.output.parent))
    try:  # so that the folder appears only when it is complete
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.chmod(0o755)
        staging.replace(arguments.output)
    except (RuntimeError, SafetensorError) as error:  # includes a full disk
        raise OSError(f"saving {arguments.output} failed, nothing was written: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    worst = max(merged.reports.values(), key=lambda report: report.relative_error)
    print(
        f"{len(merged.reports)} layers merged to bfloat16; rounding adds at most {worst.relative_error:.1e} (relative),"
        f" {merged.adapter_kept:.0%} of the adapter is kept"
    )
    print(f"model: {arguments.output}")
    return 0
