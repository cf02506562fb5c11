"""Calibrate routers: find the thresholds at which a target share of rows skips."""

from fastskip.study.calibration.calibrating import Calibration, Per, calibrate
from fastskip.study.calibration.sweep import CalibrationError

__all__ = ["Calibration", "CalibrationError", "Per", "calibrate"]
