"""The options --device and --compute-dtype of the commands, and the choices that they lead to."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="auto (a GPU that can run the operators, else the CPU), cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--compute-dtype",
        default="auto",
        help="auto (default: the fast dtype of the device), bf16, fp16 or fp32",
    )


def chosen(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """(device, dtype); prints the choices on stderr. Raises ValueError with the value and the rule."""
    import sys

    from qlora.devices import AUTO, choose_device, choose_dtype

    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.compute_dtype, device.value)
    if AUTO in (arguments.device, arguments.compute_dtype):
        print(f"device: {device}; compute dtype: {dtype}", file=sys.stderr)
    return device.value, dtype.value
