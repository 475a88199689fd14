"""``qlora quantize``: writes a 4-bit model folder, with weights calibrated on text."""

import argparse
from typing import Any

HELP = "quantize a model to a 4-bit folder, optionally calibrated on text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of a model with dense weights")
    parser.add_argument("--output", required=True, help="folder for the 4-bit model; must not exist")
    parser.add_argument(
        "--calibrate",
        metavar="TEXT",
        nargs="+",
        help="default (text that comes with qlora), a .txt or .md file, or records as for qlora finetune; several"
        " share the tokens (default: no calibration)",
    )
    parser.add_argument("--tokens", type=int, default=16384, help="tokens for calibration (default: 16384)")
    parser.add_argument(
        "--recipe",
        default="feedback",
        help="feedback (default), or scales: searches scales only, which is faster and gains less",
    )
    parser.add_argument("--format", default="qlora", help="qlora (default) or bitsandbytes: which library reads it")
    parser.add_argument("--quant-type", default="nf4", help="nf4 (default), fp4 or int4")
    parser.add_argument("--block-size", type=int, default=64, help="weights per scale (default: 64)")
    parser.add_argument("--no-double-quant", action="store_true", help="keep float32 scales")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def run(arguments: argparse.Namespace) -> int:
    from qlora.devices import choose_device
    from qlora.models.loading import require_train_extra

    require_train_extra()
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from qlora.calibration.report import REPORT_FILE
    from qlora.training.quantizing import quantize_folder

    device = choose_device(arguments.device).value
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("blocks", total=None)
        report = quantize_folder(
            arguments.model,
            arguments.output,
            calibration=arguments.calibrate,
            tokens=arguments.tokens,
            recipe=arguments.recipe,
            checkpoint_format=arguments.format,
            device=device,
            quant_type=arguments.quant_type,
            block_size=arguments.block_size,
            double_quant=not arguments.no_double_quant,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if report is not None:
        _show(report)
        print(f"report: {arguments.output}/{REPORT_FILE}")
    print(f"model: {arguments.output}")
    return 0


def _show(report: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{len(report.layers)} weights calibrated on {report.tokens} tokens ({report.recipe}) in"
        f" {report.seconds:.0f} s; errors of outputs for {report.unseen_tokens} other tokens"
    )
    for column in ("layer", "method", "plain", "calibrated"):
        table.add_column(column, justify="right" if column in ("plain", "calibrated") else "left")
    judged = [layer for layer in report.layers if layer.error == layer.error]  # nan: no unseen token reached it
    worst = sorted(judged, key=lambda layer: -layer.error)[:10]
    for layer in worst:
        table.add_row(layer.name, layer.method, f"{layer.plain_error:.2%}", f"{layer.error:.2%}")
    table.caption = "the ten with the largest error"
    console = Console()
    console.print(table)
    fallen = [layer for layer in report.layers if layer.method != report.recipe]
    if fallen:
        console.print(
            f"{len(fallen)} weights got another method than {report.recipe}, e.g. {fallen[0].name}: {fallen[0].note}"
        )
    if report.left_plain:
        console.print(
            f"{len(report.left_plain)} layers are quantized without calibration: they are outside of the blocks, or"
            " were not called"
        )
    console.print(
        f"error of the outputs, median over weights: {report.error_ratio:.2f} times that of plain quantization; loss on"
        f" the other tokens {report.loss_before:.3f} (dense blocks) -> {report.loss_after:.3f} nats per token"
    )
