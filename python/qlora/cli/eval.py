"""``qlora eval``: measures perplexity over a text file, in one or several weight formats."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from qlora.cli import choices

HELP = "measure perplexity over a text file, in one or several weight formats"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hugging Face id of a model, dense or in 4 bit")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text file")
    parser.add_argument("--adapter", type=Path, help="adapter folder, from qlora finetune or PEFT")
    parser.add_argument(
        "--format",
        nargs="+",
        help="fp32, bf16, nf4, fp4, int4; the last three also as e.g. nf4-dq (default: trained, the format of the"
        " adapter's training; nf4-dq without an adapter; stored for a model that is already in 4 bit)",
    )
    parser.add_argument("--context", type=int, default=512, help="tokens per window (default: 512)")
    parser.add_argument("--stride", type=int, help="tokens between the starts of windows (default: half the context)")
    parser.add_argument("--max-tokens", type=int, help="use only this many tokens of the text")
    choices.add_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the figures to this file")


def _show(progress: Any, task: Any, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def run(arguments: argparse.Namespace) -> int:
    from qlora.models.loading import require_train_extra

    require_train_extra()
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from qlora.evaluation.perplexity import (
        FORMATS,
        STORED,
        TRAINED,
        default_format,
        load_in_format,
        perplexity,
        share_in_calibration,
        tokens_of,
    )

    for name in arguments.format or ():
        if name not in (*FORMATS, STORED, TRAINED):
            raise ValueError(f"--format '{name}' is unknown: use one of {', '.join(FORMATS)}")
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{arguments.text} is not UTF-8: {error}") from error
    ids, first = tokens_of(arguments.model, text)
    ids = ids[: arguments.max_tokens]
    seen = share_in_calibration(arguments.model, ids)
    if seen:
        print(f"{seen:.1%} of the text's runs of eight tokens were in the calibration text", file=sys.stderr)
    device, dtype = choices.chosen(arguments)
    results = {}
    with Progress(transient=True) as progress:
        for name in arguments.format or [default_format(arguments.model, arguments.adapter)]:
            task = progress.add_task(name, total=len(ids))
            model = load_in_format(arguments.model, name, dtype, arguments.adapter, device)
            show = partial(_show, progress, task)
            results[name] = perplexity(model, ids, arguments.context, arguments.stride, show, first)
            del model
    table = Table(title=f"{arguments.text.name}: {len(ids) - 1} tokens scored", title_justify="left")
    for column in ("weights", "nats per token", "perplexity"):
        table.add_column(column, justify="left" if column == "weights" else "right")
    for name, result in results.items():
        table.add_row(name, f"{result.nats_per_token:.4f}", f"{result.perplexity:.3f}")
    Console().print(table)
    if arguments.json:
        figures = {n: {"nats_per_token": r.nats_per_token, "perplexity": r.perplexity} for n, r in results.items()}
        record = {"tokens": len(ids) - 1, "context": arguments.context, "seen": seen, "formats": figures}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0
