"""ONNX graphs that are numerically the model: written, operated on, and described so that nothing wrong is run."""

from .exporting import calibration_hash, export, make_graph
from .manifest import GraphInfo, Manifest
from .spec import QDQ, STAGE_GRAPHS, ExportPrecision, ExportSpec, FloatType, GraphName
from .weights import Weights, hashed_weights, weights_of_checkpoint, weights_of_model

__all__ = [
    "QDQ",
    "STAGE_GRAPHS",
    "ExportPrecision",
    "ExportSpec",
    "FloatType",
    "GraphInfo",
    "GraphName",
    "Manifest",
    "Weights",
    "calibration_hash",
    "export",
    "hashed_weights",
    "make_graph",
    "weights_of_checkpoint",
    "weights_of_model",
]
