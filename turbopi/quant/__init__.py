"""Weights and numbers made smaller or faster: folding, number formats, precision plans, calibration."""

from .calibrate import calibrate, synthetic_calibration
from .calibration import CALIBRATION_FILE, Calibration, InputRange, Observer, Quantisation, model_hash
from .plan import FORMATS, NEEDS_CALIBRATION, Format, PrecisionPlan, input_width, product_names
from .reference import linear_paths, quantisation_details, quantised, weight_bytes

__all__ = [
    "CALIBRATION_FILE",
    "FORMATS",
    "NEEDS_CALIBRATION",
    "Calibration",
    "Format",
    "InputRange",
    "Observer",
    "PrecisionPlan",
    "Quantisation",
    "calibrate",
    "input_width",
    "linear_paths",
    "model_hash",
    "product_names",
    "quantisation_details",
    "quantised",
    "synthetic_calibration",
    "weight_bytes",
]
