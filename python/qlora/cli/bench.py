"""``qlora bench``: compares the operators with torch, bitsandbytes and the measured limits of this machine."""

import argparse
from pathlib import Path

HELP = "compare the operators with torch, bitsandbytes and this machine's limits"
WORKS = ("forward", "backward", "quantize", "multi", "step")
DTYPES = ("bf16", "fp16", "fp32")
SHAPES = ("4096x4096",)
TOKENS = (1, 16, 64, 128, 512, 2048)


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) > 0 and int(k) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not OUTxIN, e.g. 4096x4096")
    return int(n), int(k)


def _peers(text: str) -> tuple[str, ...]:
    from qlora.bench.works import PEERS

    names = tuple(name for name in text.split(",") if name and name != "none")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is unknown: use {', '.join(PEERS)} or none")
    return names


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds (inf: no limit)")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("works", nargs="*", metavar="WORK", help=f"any of {', '.join(WORKS)} (default: all but step)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--compare", type=_peers, default=("torch",), metavar="PEERS",
        help="torch,bitsandbytes or none (default: torch)",
    )  # fmt: skip
    parser.add_argument("--shape", type=_shape, nargs="+", default=[_shape(s) for s in SHAPES], metavar="OUTxIN")
    parser.add_argument("--m", type=int, nargs="+", default=TOKENS, metavar="TOKENS", help="tokens of each product")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters; 0: no adapters (default: 16)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=7, help="number of alternating rounds (default: 7)")
    parser.add_argument(
        "--time-limit", type=_seconds, default=20.0, metavar="SECONDS",
        help="for each contender of a row; slower ones get fewer rounds, or are stopped (default: 20)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--png", type=Path, help="write a roofline chart to this file")


def run(arguments: argparse.Namespace) -> int:
    if unknown := set(arguments.works) - set(WORKS):
        raise ValueError(f"{', '.join(sorted(unknown))} is unknown: use {', '.join(WORKS)}")
    if arguments.repeats < 2:
        raise ValueError(f"repeats={arguments.repeats}: a median needs at least 2")
    import torch

    from qlora._load import has_cuda_ops
    from qlora.bench import works as w
    from qlora.bench.measure import describe, measure_limits
    from qlora.bench.progress import Progress
    from qlora.bench.report import Result, print_table, write_json, write_roofline
    from qlora.bench.session import Measured, Session
    from qlora.bench.step import step_work
    from qlora.devices import DTYPES as DTYPES_BY_NAME

    device = torch.device(arguments.device)
    if device.type == "cuda" and not (torch.cuda.is_available() and has_cuda_ops()):
        raise ValueError("--device cuda: torch sees no GPU, or qlora was built without CUDA operators (see qlora info)")
    dtype = DTYPES_BY_NAME[arguments.dtype]
    wanted = arguments.works or [name for name in WORKS if name != "step"]
    works = [
        work
        for shape in arguments.shape
        for work in w.works_of_shape(wanted, shape, arguments.m, arguments.rank, dtype, device, arguments.compare)
    ]
    if "step" in wanted:
        works.append(step_work(512, arguments.rank, dtype, device, arguments.compare))

    if not works:
        raise ValueError(f"no work is left of {', '.join(wanted)}: backward needs 2 tokens, multi an adapter")

    begun: list[Measured] = []
    stopped: BaseException | None = None
    try:
        with Progress() as progress, Session(device, arguments.repeats, arguments.time_limit, progress) as session:
            progress.start("measuring the limits of this machine")
            machine, limits = session.call(describe, device), session.call(measure_limits, device, dtype)
            progress.works([work.share(limits) for work in works])
            for work in works:
                progress.start(work.label())
                begun.append(Measured(work))
                session.measure(begun[-1])
                progress.finish()
    except BaseException as error:
        if not begun:
            raise
        stopped = error
        begun[-1].interrupt()
        begun = [measured for measured in begun if measured.seconds or measured is not begun[-1]]

    results = [Result.of(measured, limits) for measured in begun]
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"limits here: {limits.read_bytes_per_s / 1e9:.1f} GB/s read, {limits.flops_per_s / 1e9:.0f} GFLOP/s dense")
    print_table(results)
    if arguments.json:
        write_json(arguments.json, machine, limits, results, complete=stopped is None)
    if arguments.png:
        write_roofline(arguments.png, machine, limits, results)
    if isinstance(stopped, KeyboardInterrupt):
        raise KeyboardInterrupt(f"interrupted in work {len(begun)} of {len(works)}")
    if stopped is not None:
        raise stopped
    return 0
