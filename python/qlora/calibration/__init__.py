"""Calibrated quantization: chooses scales and codes of 4-bit weights for the inputs that a layer really gets."""

from qlora.calibration.model import calibrate
from qlora.calibration.report import CalibrationReport, LayerReport

__all__ = ["CalibrationReport", "LayerReport", "calibrate"]
