"""The options --device and --compute-dtype of the commands, and what they come to."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU that has our operators, else the CPU), cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        help="auto (default: what the device multiplies fast), bf16, fp16 or fp32",
    )


def chosen(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(device, dtype); the choice of auto is told on stderr. Raises ValueError naming the value and the rule."""
    import sys

    from qlora.devices import AUTO, choose_device, choose_dtype

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.compute_dtype, device.value)
    if AUTO in (arguments.device, arguments.compute_dtype):
        print(f"device: {device}; compute dtype: {dtype}", file=sys.stderr)
    return device.value, dtype.value
