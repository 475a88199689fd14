"""Reports a benchmark run: a table, a JSON file and a roofline chart."""

import io
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora.bench.left_out import LeftOut
from qlora.bench.measure import Limits, median_ratio
from qlora.bench.session import Measured
from qlora.bench.works import sizes
from qlora.storage.files import atomic_write

NOISY = 0.10  # results with a larger spread should be measured again


@dataclass(frozen=True)
class Result:
    """Times of one work; a ratio is qlora's time divided by a peer's, as the median over rounds."""

    name: str
    extents: dict[str, int]
    flops: float
    size_bytes: float
    contenders: tuple[str, ...]
    seconds: dict[str, list[float]]
    left_out: dict[str, LeftOut]
    limit_seconds: float

    @classmethod
    def of(cls, measured: Measured, limits: Limits) -> "Result":
        work, limit = measured.work, limits.seconds(measured.flops, measured.size_bytes)
        return cls(
            work.name, dict(work.extents), measured.flops, measured.size_bytes, work.contenders, measured.seconds,
            measured.left_out, limit,
        )  # fmt: skip

    def median(self, contender: str) -> float:
        return statistics.median(self.seconds[contender])

    @property
    def peers(self) -> tuple[str, ...]:
        return self.contenders[1:]

    def ratios(self) -> dict[str, tuple[float, float]]:
        ours = self.seconds.get("qlora")
        if ours is None:
            return {}
        return {name: median_ratio(ours, self.seconds[name]) for name in self.peers if name in self.seconds}

    @property
    def share_of_limit(self) -> float | None:
        return self.limit_seconds / self.median("qlora") if "qlora" in self.seconds else None

    def rounds(self, contender: str) -> str:
        """A remark on a contender that had fewer rounds than another one."""
        own = len(self.seconds[contender])
        if own == max(map(len, self.seconds.values())) and own > 1:
            return ""
        return " (1 call)" if own == 1 else f" ({own} rounds)"

    def cell_of_qlora(self) -> str:
        if "qlora" not in self.seconds:
            return self.left_out["qlora"].why
        return f"{1e3 * self.median('qlora'):.3f}{self.rounds('qlora')}"

    def cell_of_peer(self, peer: str) -> str:
        if peer not in self.contenders:
            return "–"
        if peer in self.left_out:
            reason = self.left_out[peer]
            if reason.more_than_s is None or "qlora" not in self.seconds:
                return reason.why
            most = math.ceil(100 * self.median("qlora") / reason.more_than_s) / 100
            return f"< {most:.2f} ({reason.why})"
        if peer not in self.ratios():
            return f"{1e3 * self.median(peer):.3f} ms"
        ratio, spread = self.ratios()[peer]
        if math.isnan(spread):
            return f"{ratio:.2g}{self.rounds(peer)}"
        return f"{ratio:.2f} ± {ratio * spread / 2:.2f}{' noisy' if spread > NOISY else ''}{self.rounds(peer)}"


def print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    peers = list(dict.fromkeys(name for result in results for name in result.peers))
    table = Table(
        title="time of qlora ÷ time of the peer, medians over alternating rounds (± half the interquartile range)"
    )
    for heading in ("work", "extents", "qlora ms", *(f"÷ {peer}" for peer in peers), "GFLOP/s", "GB/s", "of the limit"):
        table.add_column(heading, justify="left" if heading in {"work", "extents"} else "right")
    for result in results:
        rates = ["–"] * 3
        if (share := result.share_of_limit) is not None:
            ms = 1e3 * result.median("qlora")
            rates = [f"{result.flops / ms / 1e6:.0f}", f"{result.size_bytes / ms / 1e6:.1f}", f"{100 * share:.0f} %"]
        cells = [result.cell_of_peer(peer) for peer in peers]
        table.add_row(result.name, sizes(result.extents), result.cell_of_qlora(), *cells, *rates)
    console = Console(width=140)
    console.print(table)
    for line in explanations(results):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def explanations(results: list[Result]) -> list[str]:
    """A line for each reason to leave a contender out, where its cells do not say everything."""
    places: dict[tuple[str, LeftOut], list[str]] = {}
    for result in results:
        for name, reason in result.left_out.items():
            if reason.detail:
                places.setdefault((name, reason), []).append(f"{result.name} {sizes(result.extents)}")
    lines = []
    for (name, reason), labels in places.items():
        more = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        where = "everywhere" if len(labels) == len(results) else labels[0] + more
        lines.append(f"{name} {where}: {reason.why}: {reason.detail}")
    return lines


def write_json(path: Path, machine: dict[str, str], limits: Limits, results: list[Result], complete: bool) -> None:
    def row(result: Result) -> dict[str, Any]:
        ratios = {
            peer: {"median": ratio, "spread": None if math.isnan(spread) else spread}
            for peer, (ratio, spread) in result.ratios().items()
        }
        return asdict(result) | {"ratios": ratios, "share_of_limit": result.share_of_limit}

    content = {
        "machine": machine,
        "limits": asdict(limits),
        "complete": complete,
        "results": [row(r) for r in results],
    }
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
