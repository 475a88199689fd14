"""Reports a benchmark run: a table, a JSON file and a roofline chart."""

import io
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.bench.measure import Limits, median_ratio
from qlora.bench.works import Work
from qlora.storage.files import atomic_write

NOISY = 0.10  # results with a larger spread should be measured again


@dataclass(frozen=True)
class Result:
    """Times of one work; a ratio is qlora's time divided by a peer's, as the median over rounds."""

    name: str
    extents: dict[str, int]
    flops: float
    size_bytes: float
    seconds: dict[str, list[float]]
    limit_seconds: float

    @classmethod
    def of(cls, work: Work, times: dict[str, list[float]], limits: Limits) -> "Result":
        limit = limits.seconds(work.flops, work.size_bytes)
        return cls(work.name, dict(work.extents), work.flops, work.size_bytes, times, limit)

    def median(self, contender: str) -> float:
        return statistics.median(self.seconds[contender])

    def ratios(self) -> dict[str, tuple[float, float]]:
        ours = self.seconds["qlora"]
        return {name: median_ratio(ours, times) for name, times in self.seconds.items() if name != "qlora"}

    @property
    def share_of_limit(self) -> float:
        return self.limit_seconds / self.median("qlora")

    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.extents.items() if value)


def print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    peers = list(dict.fromkeys(name for result in results for name in result.seconds if name != "qlora"))
    table = Table(
        title="time of qlora ÷ time of the peer, medians over alternating rounds (± half the interquartile range)"
    )
    for heading in ("work", "extents", "qlora ms", *(f"÷ {peer}" for peer in peers), "GFLOP/s", "GB/s", "of the limit"):
        table.add_column(heading, justify="left" if heading in {"work", "extents"} else "right")
    for result in results:
        ms, ratios = 1e3 * result.median("qlora"), result.ratios()
        cells = []
        for peer in peers:
            if peer not in ratios:
                cells.append("–")
                continue
            ratio, spread = ratios[peer]
            cells.append(f"{ratio:.2f} ± {ratio * spread / 2:.2f}{' noisy' if spread > NOISY else ''}")
        table.add_row(
            result.name,
            result.label(),
            f"{ms:.3f}",
            *cells,
            f"{result.flops / ms / 1e6:.0f}",
            f"{result.size_bytes / ms / 1e6:.1f}",
            f"{100 * result.share_of_limit:.0f} %",
        )
    Console(width=140).print(table)


def write_json(path: Path, machine: dict[str, str], limits: Limits, results: list[Result]) -> None:
    def row(result: Result) -> dict[str, Any]:
        ratios = {peer: {"median": r, "spread": s} for peer, (r, s) in result.ratios().items()}
        return asdict(result) | {"ratios": ratios, "share_of_limit": result.share_of_limit}

    content = {"machine": machine, "limits": asdict(limits), "results": [row(r) for r in results]}
    atomic_write(path, json.dumps(content, indent=2).encode())


def write_roofline(path: Path, machine: dict[str, str], limits: Limits, results: list[Result]) -> None:
    """Plots achieved FLOP/s over FLOP per byte, with the two limits of the machine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [result for result in results if result.flops > 0]
    figure, axes = plt.subplots(figsize=(9, 5.5))
    ridge = limits.flops_per_s / limits.read_bytes_per_s
    intensities = [result.flops / result.size_bytes for result in shown] or [ridge]
    span = [min(*intensities, ridge) / 2, max(*intensities, ridge) * 2]
    roof = [min(limits.flops_per_s, x * limits.read_bytes_per_s) / 1e9 for x in (span[0], ridge, span[1])]
    axes.plot([span[0], ridge, span[1]], roof, color="black", label="limits measured in this run")
    colors = {"qlora": "#4477aa", "torch": "#ee7733", "bitsandbytes": "#cc3311", "one adapter": "#999999"}
    for name, color in colors.items():
        points = [(r.flops / r.size_bytes, r.flops / r.median(name) / 1e9) for r in shown if name in r.seconds]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=22, color=color, label=name, zorder=3)
    axes.set(
        xscale="log", yscale="log", xlabel="FLOP per byte (4-bit weights, tokens, results)", ylabel="GFLOP/s",
        title=machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}",
    )  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    plt.close(figure)
    atomic_write(path, image.getvalue())
