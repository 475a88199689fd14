"""Prints plans as a table, and writes them as a bar chart and as JSON."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.planning.estimate import Estimate

GB = 10**9


def describe(plan: Estimate) -> str:
    s = plan.settings
    optimizer = f"{s.optimizer_bits}-bit{' paged' if s.paged else ''}"
    devices = f", {s.devices} devices" if s.devices > 1 else ""
    return (
        f"r={s.rank} {s.batch}x{s.sequence} {'checkpointed' if s.checkpointing else 'all kept'}, {optimizer}{devices}"
    )


def table(plans: list[Estimate], title: str, budget: float | None, reserve: float) -> Any:
    """A rich table with one row per plan, in GB."""
    from rich.table import Table

    result = Table(title=title, title_justify="left")
    result.add_column("settings")
    for name in plans[0].parts():
        result.add_column(name, justify="right")
    result.add_column("on the device", justify="right")
    if budget is not None:
        result.add_column(f"fits {budget:g} GB", justify="center")
    for plan in plans:
        cells = [f"{size / GB:.2f}" for size in plan.parts().values()]
        if plan.settings.paged:
            place = list(plan.parts()).index("optimizer")
            cells[place] = f"({cells[place]})"
        row = [describe(plan), *cells, f"{plan.resident / GB:.2f}"]
        if budget is not None:
            row.append("yes" if fits(plan, budget, reserve) else "no")
        result.add_row(*row)
    return result


def fits(plan: Estimate, budget: float, reserve: float) -> bool:
    """Whether a plan fits in ``budget`` GB, of which the runtime uses ``reserve``."""
    return plan.resident + reserve * GB <= budget * GB


def as_json(plans: list[Estimate], model: str, budget: float | None, reserve: float) -> dict[str, Any]:
    entries = []
    for plan in plans:
        entry = {"settings": asdict(plan.settings), "bytes": plan.parts(), "resident_bytes": plan.resident}
        if budget is not None:
            entry["fits"] = fits(plan, budget, reserve)
        entries.append(entry)
    return {"model": model, "budget_gb": budget, "reserve_gb": reserve, "plans": entries}


def draw(plans: list[Estimate], path: Path, title: str, budget: float | None) -> None:
    """Draws a stacked bar per plan; paged optimizer state is hatched, because it is not on the device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.6 + 0.5 * len(plans)))
    names = [describe(plan) for plan in plans]
    left = [0.0] * len(plans)
    for kind in plans[0].parts():
        sizes = [0.0 if kind == "optimizer" and plan.settings.paged else plan.parts()[kind] / GB for plan in plans]
        axes.barh(names, sizes, left=left, label=kind)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    paged = [plan.optimizer / GB if plan.settings.paged else 0.0 for plan in plans]
    if any(paged):
        axes.barh(names, paged, left=left, label="optimizer, paged", color="none", edgecolor="gray", hatch="//")
    if budget is not None:
        axes.axvline(budget, color="black", linestyle="--", label=f"{budget:g} GB")
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.set_title(title)
    axes.legend(fontsize="small", bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
