"""Writes a run's report: report.json with the figures, report.png with loss, learning rate, speed and memory."""

import json
from pathlib import Path
from typing import Any

from qlora.storage.files import atomic_write
from qlora.training.memory import MIB

_BLUE, _RED, _GREY = "#4477aa", "#cc3311", "#999999"


def write_report(folder: Path, figures: dict[str, Any], history: list[dict[str, Any]]) -> None:
    """Writes report.json and report.png. ``history`` is the Trainer's log, with seconds and tokens since the start."""
    atomic_write(folder / "report.json", json.dumps({**figures, "history": history}, indent=2).encode())
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5))
    (loss, memory), (rate, speed) = axes
    _draw_loss(loss, history)
    _draw_memory(memory, figures)
    _draw_points(rate, [(e["step"], e["learning_rate"]) for e in history if "learning_rate" in e], "learning rate")
    _draw_points(speed, tokens_per_second(history), "tokens / s")
    figure.suptitle(_title(figures), fontsize=11)
    figure.tight_layout()
    temporary = folder / ".report.png"
    figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
    temporary.replace(folder / "report.png")


def tokens_per_second(history: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, tokens per second since the previous entry) for the log's entries with a training loss."""
    entries = [e for e in history if "loss" in e and "num_input_tokens_seen" in e and "seconds" in e]
    before, result = {"num_input_tokens_seen": 0, "seconds": 0.0}, []
    for entry in entries:
        seconds = entry["seconds"] - before["seconds"]
        tokens = entry["num_input_tokens_seen"] - before["num_input_tokens_seen"]
        if seconds > 0 and tokens > 0:  # in a resumed run seconds restart at zero
            result.append((entry["step"], tokens / seconds))
        before = entry
    return result


def _title(figures: dict[str, Any]) -> str:
    lines = [Path(str(figures.get("model", ""))).name]
    for key in ("device", "compute_dtype", "optimizer", "loss"):
        if key in figures:
            lines.append(f"{key.replace('_', ' ')}: {figures[key]}")
    return f"{lines[0]}\n{' · '.join(lines[1:3])}\n{' · '.join(lines[3:])}"


def _draw_loss(axes: Any, history: list[dict[str, Any]]) -> None:
    for key, label, color in (("loss", "training", _BLUE), ("eval_loss", "evaluation", _RED)):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label, color=color)
            if key == "eval_loss":
                for step, value in (points[0], points[-1]):
                    axes.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(4, 6), color=color)
    axes.margins(x=0.08, y=0.1)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    if axes.has_data():
        axes.legend()
    axes.grid(alpha=0.3)


def _draw_points(axes: Any, points: list[tuple[int, float]], label: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, color=_BLUE)
    else:
        axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color=_GREY)
    axes.set(xlabel="step", ylabel=label, title=label.capitalize())
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_memory(axes: Any, figures: dict[str, Any]) -> None:
    sizes = {kind.replace("_", " "): size for kind, size in figures["memory_bytes"].items()}
    for key, label in (("planned_memory_bytes", "planned total"), ("peak_memory_bytes", "measured peak")):
        if figures.get(key):
            sizes[label] = figures[key]
    colors = [
        _GREY if kind.endswith("16bit") else _RED if kind.startswith(("planned", "measured")) else _BLUE
        for kind in sizes
    ]
    axes.barh(list(sizes), [size / MIB for size in sizes.values()], color=colors)
    for row, size in enumerate(sizes.values()):
        axes.text(size / MIB, row, f" {size / MIB:.1f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="MiB", title="Memory by kind")
