"""Engines over a directory that `turbo-pi export` wrote: "onnx:DIRECTORY" and "tensorrt:DIRECTORY"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..model import Pi0
from ..quant import Quantisation
from .base import Precision, register_family
from .onnx import create_onnx
from .tensorrt import create_tensorrt

if TYPE_CHECKING:
    from .graphs.engine import GraphEngine

RUNTIMES = {"onnx": create_onnx, "tensorrt": create_tensorrt}


@register_family(":")
def create_exported(
    name: str, model: Pi0, precision: Precision, quantisation: Quantisation | None = None
) -> GraphEngine:
    """The engine "RUNTIME:DIRECTORY". Raises ValueError for another runtime, and whatever the runtime raises."""
    runtime, _, directory = name.partition(":")
    if runtime not in RUNTIMES or not directory:
        raise ValueError(
            f"unknown engine {name!r}: {' and '.join(map(repr, RUNTIMES))} take a directory, as in "
            "'onnx:exports/libero'"
        )
    return RUNTIMES[runtime](model, precision, quantisation, directory)
