"""The report of a merge: the errors of each merged weight as a JSON file, and in one sentence."""

import json
import math
from dataclasses import asdict

from qlora.adapters.merging import Merged

REPORT_FILE = "merge.json"


def report_of(merged: Merged) -> str:
    """The file's text: the share of the adapter that is kept, and the fields of MergeReport for each layer by name."""
    layers = {name: _without_nan(asdict(report)) for name, report in merged.reports.items()}
    return json.dumps({"adapter_kept": _number(merged.adapter_kept), "layers": layers}, indent=1)


def summary_of(merged: Merged) -> str:
    """One sentence: layers, format, the largest error, and how much of the adapter is kept."""
    if not merged.reports:
        return "no linear layer has the adapter: experts were merged, which have no report"
    name, worst = max(merged.reports.items(), key=lambda item: item[1].relative_error)
    return (
        f"{len(merged.reports)} layers merged to {worst.format}; rounding adds at most {worst.relative_error:.1e}"
        f" (relative, {name}), {merged.adapter_kept:.0%} of the adapter is kept"
    )


def _without_nan(fields: dict[str, object]) -> dict[str, object]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in fields.items()}


def _number(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else value
