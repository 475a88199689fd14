"""``qlora plan``: predicts the memory of a training step from a model's config alone."""

import argparse
import json
from itertools import product
from pathlib import Path

HELP = "predict the memory of fine-tuning from a model's config alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        help="a preset (llama-65b, llama3-70b, llama3-8b, llama-7b, smollm2-135m, qwen3-30b-a3b, gpt-oss-20b), or a"
        " folder",
    )
    parser.add_argument("--budget", type=float, metavar="GB", help="memory of one device, in 10^9 bytes")
    parser.add_argument(
        "--reserve",
        type=float,
        default=1.0,
        metavar="GB",
        help="GB of the budget that the runtime itself uses (default: 1, an assumption)",
    )
    parser.add_argument("--rank", type=int, nargs="+", default=[16])
    parser.add_argument("--adapt-experts", action="store_true", help="also an adapter for each expert of a mixture")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences on each device")
    parser.add_argument("--seq", type=int, nargs="+", default=[512, 2048], help="tokens per sequence")
    parser.add_argument("--checkpointing", choices=("on", "off", "both"), default="both")
    parser.add_argument("--optimizer-bits", type=int, nargs="+", default=[32], choices=(32, 8))
    parser.add_argument("--paged", action="store_true", help="keep optimizer state outside the device's memory")
    parser.add_argument("--offload-experts", action="store_true", help="keep the experts of a mixture on the host")
    parser.add_argument("--devices", type=int, nargs="+", default=[1], help="number of devices, sharded with FSDP2")
    parser.add_argument("--quant-type", default="nf4")
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", help="dtype of activations (default: bfloat16)")
    parser.add_argument("--adapter-dtype", default="float32")
    parser.add_argument("--json", type=Path, help="write all figures, in bytes, to this file")
    parser.add_argument("--png", type=Path, help="write a bar chart to this file")


def run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from qlora.planning.estimate import Settings, estimate, experts_note
    from qlora.planning.presets import config_of
    from qlora.planning.report import as_json, draw, table

    checkpointing = {"on": (True,), "off": (False,), "both": (True, False)}[arguments.checkpointing]
    config = config_of(arguments.model)
    plans = [
        estimate(
            config,
            Settings(
                rank=rank,
                adapt_experts=arguments.adapt_experts,
                batch=batch,
                sequence=sequence,
                checkpointing=kept,
                optimizer_bits=bits,
                paged=arguments.paged,
                quant_type=arguments.quant_type,
                double_quant=not arguments.no_double_quant,
                dtype=arguments.dtype,
                adapter_dtype=arguments.adapter_dtype,
                devices=devices,
                offload_experts=arguments.offload_experts,
            ),
        )
        for rank, batch, sequence, kept, bits, devices in product(
            arguments.rank,
            arguments.batch,
            arguments.seq,
            checkpointing,
            arguments.optimizer_bits,
            arguments.devices,
        )
    ]
    title = f"{arguments.model}: GB on each device for one training step"
    console = Console()
    # In a file or a pipe the table may be wider than a terminal.
    console = console if console.is_terminal else Console(width=200)
    console.print(table(plans, title, arguments.budget, arguments.reserve))
    for note in dict.fromkeys(experts_note(config, plan.settings) for plan in plans):
        if note is not None:
            console.print(note)
    if arguments.paged:
        console.print("Optimizer state in parentheses is paged: it needs this much memory or disk of the host.")
    if arguments.json:
        entries = as_json(plans, arguments.model, arguments.budget, arguments.reserve)
        arguments.json.write_text(json.dumps(entries, indent=2) + "\n")
    if arguments.png:
        draw(plans, arguments.png, title, arguments.budget)
    return 0
