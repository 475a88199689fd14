"""What a calibration did: the error of each layer's outputs, and of the whole model, before and after."""

from dataclasses import dataclass, field
from statistics import median

REPORT_FILE = "calibration.json"  # in a folder that `qlora quantize` has written


@dataclass(frozen=True)
class LayerReport:
    """One calibrated weight."""

    name: str
    method: str  # "feedback", "scales" or "plain"
    error: float  # relative error of its outputs for unseen tokens; nan if none reached it
    plain_error: float  # the same for quantization without calibration
    note: str = ""  # why another method than the recipe's
    # After a merge: the kept share of the adapter's change D of the outputs, <merged - base, D> / <D, D>.
    kept: float | None = None


@dataclass
class CalibrationReport:
    """Result of :func:`qlora.calibrate`."""

    tokens: int  # for the moments
    unseen_tokens: int  # for the errors
    recipe: str
    layers: list[LayerReport] = field(default_factory=list)
    left_plain: list[str] = field(default_factory=list)  # 4-bit layers outside of the blocks, or never called
    loss_before: float = float("nan")  # nats per unseen token with dense blocks; nan without token logits
    loss_after: float = float("nan")  # with the calibrated ones
    seconds: float = 0.0

    @property
    def error_ratio(self) -> float:
        """The median over weights of the error divided by that of plain quantization."""
        ratios = [layer.error / layer.plain_error for layer in self.layers if layer.plain_error > 0]
        return median(ratios) if ratios else 1.0
