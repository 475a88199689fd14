"""quantize_folder: writes a 4-bit copy of a model folder, calibrated or not."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qlora.calibration import CalibrationReport, calibrate
from qlora.calibration.overlap import run_hashes, to_text
from qlora.calibration.report import REPORT_FILE
from qlora.calibration.texts import UNSEEN_TOKENS
from qlora.calibration.weights import RECIPES
from qlora.models.loading import load_quantized, load_tokenizer, resolve_model
from qlora.storage.files import complete_folder
from qlora.training.calibration_data import calibration_ids

FORMATS = ("qlora", "bitsandbytes")


def quantize_folder(
    model: str | Path,
    output: str | Path,
    *,
    calibration: Sequence[str] | None = None,
    tokens: int = 16384,
    recipe: str = "feedback",
    checkpoint_format: str = "qlora",
    device: torch.device | str = "cpu",
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip_bad: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> CalibrationReport | None:
    """Quantizes the model folder or id ``model`` into the new folder ``output``; returns the calibration's report.

    ``calibration`` names the sources of text, see :func:`qlora.training.calibration_data.calibration_ids`; None
    quantizes each weight by itself. Dense tensors keep their dtype. The output appears only when it is complete. Until
    then finished blocks are kept in a hidden folder beside it, from which the same command goes on.

    Raises FileExistsError if ``output`` exists, ValueError for bad options, OSError if saving fails.
    """
    from transformers import AutoConfig

    output = Path(output)
    if output.exists():
        raise FileExistsError(f"{output} exists: choose another output")
    if checkpoint_format not in FORMATS:
        raise ValueError(f"format '{checkpoint_format}' is unknown: use one of {', '.join(FORMATS)}")
    if recipe not in RECIPES:
        raise ValueError(f"recipe='{recipe}' is unknown: use one of {', '.join(RECIPES)}")
    folder = resolve_model(model)
    config = AutoConfig.from_pretrained(folder)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{folder} is quantized already: qlora quantize needs dense weights")
    tokenizer = load_tokenizer(folder)
    dtype = getattr(config, "dtype", None) or torch.float32
    format_: dict[str, Any] = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    ids = None if calibration is None else calibration_ids(calibration, tokenizer, tokens + UNSEEN_TOKENS, skip_bad)
    loaded, _ = load_quantized(folder, dtype, device=device, progress=False, **format_)
    report = None
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial"
    if ids is not None:
        report = calibrate(
            loaded,
            ids,
            tokenizer,
            weights=folder,
            tokens=tokens,
            recipe=recipe,
            partial=partial,
            on_progress=on_progress,
        )
    summary = (
        None if report is None or ids is None else {**_without_nan(asdict(report)), "seen": to_text(run_hashes(ids))}
    )
    _save(loaded, tokenizer, output, checkpoint_format, summary)
    shutil.rmtree(partial, ignore_errors=True)
    return report


def _without_nan(value: Any) -> Any:
    """The value with None in the place of nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _save(model: Any, tokenizer: Any, output: Path, checkpoint_format: str, report: dict[str, Any] | None) -> None:
    from qlora.integrations.bitsandbytes.checkpoints import export_checkpoint

    with complete_folder(output) as staging:
        if checkpoint_format == "bitsandbytes":
            export_checkpoint(model, staging)
        else:
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if report is not None:
            (staging / REPORT_FILE).write_text(json.dumps(report, indent=1))
