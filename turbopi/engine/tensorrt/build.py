"""Building an engine from an ONNX graph: strongly typed, so that the graph's own types are what is computed in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import write_whole

GIBIBYTE = 1 << 30


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Attributes:
        workspace: bytes of scratch memory that TensorRT may plan with.
        timing_cache: file that keeps what was measured, so that the next build need not; None measures anew.
        strict_cache: refuse a timing cache that was made on another GPU instead of measuring anew.
    """

    workspace: int = 4 * GIBIBYTE
    timing_cache: Path | None = None
    strict_cache: bool = False

    def __post_init__(self) -> None:
        if self.workspace < 1:
            raise ValueError(f"workspace must be a positive number of bytes, got {self.workspace}")


def build_plan(trt: Any, graph: Path, options: BuildOptions) -> bytes:
    """The serialised engine of a graph with static shapes. Takes minutes.

    Raises ValueError with the parser's or builder's own words if the graph cannot be built.
    """
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    # TensorRT 11 is always strongly typed and takes the flag without a meaning.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # From the file, so that the parser finds the weights beside it.
    if not parser.parse_from_file(str(graph)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise ValueError(f"TensorRT {trt.__version__} cannot read {graph}: {said}; try another --opset or --attention")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    _give_timing_cache(config, options)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ValueError(
            f"TensorRT {trt.__version__} could not build {graph}; its log says why. Often the workspace of "
            f"{options.workspace / GIBIBYTE:.1f} GiB or the GPU's memory does not suffice"
        )
    _keep_timing_cache(config, options)
    return bytes(plan)


def _give_timing_cache(config: Any, options: BuildOptions) -> None:
    if options.timing_cache is None:
        return
    known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
    cache = config.create_timing_cache(known)
    if config.set_timing_cache(cache, ignore_mismatch=False):
        return
    if options.strict_cache:
        raise ValueError(
            f"the timing cache {options.timing_cache} was made on another GPU or by another TensorRT; remove it, or "
            "leave strict_cache off to measure anew"
        )
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _keep_timing_cache(config: Any, options: BuildOptions) -> None:
    if options.timing_cache is not None:
        write_whole(options.timing_cache, bytes(config.get_timing_cache().serialize()))
