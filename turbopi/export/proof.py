"""An exported graph held against the reference, tap by tap, in ONNX Runtime on the CPU.

Three ways. "forced": every stage gets what the reference's stage before it gave, and every denoise step the reference's
x_t. "stage": stages as forced, the denoise loop left to itself. "free": the whole graph from images to actions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from ..model import ModelInput, Pi0, PrefixCache
from ..quant import Quantisation
from .exporting import make_graph
from .files import write_graphs
from .graphs import (
    IMAGE_TOKENS,
    IMAGES,
    NOISE,
    PREFIX_LENGTH,
    PROMPT_LENGTH,
    STATE,
    TOKENS,
    cache_names,
)
from .spec import ExportSpec, GraphName
from .surgery import expose, inject
from .weights import Weights, as_array, weights_of_model

Way = Literal["forced", "stage", "free"]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TapReading:
    """How far a graph is from the reference at one tap.

    Attributes:
        graph: which.
        way: how the graph was fed.
        tap: the reference's name.
        relative: root-mean-square of the difference over that of the reference.
        max_relative: largest difference over the reference's largest magnitude.
    """

    graph: GraphName
    way: Way
    tap: str
    relative: float
    max_relative: float


@dataclass(frozen=True)
class Reference:
    """One observation through the reference: its taps, and what it takes to feed the graphs the same.

    Attributes:
        feeds: inputs of the graphs by name, those that come from stages before included.
        taps: values by the names that they have in the graphs, valid rows only.
    """

    feeds: Arrays
    taps: Arrays


def reference(
    model: Pi0,
    inputs: ModelInput,
    noise: Tensor,
    steps: int,
    prompt: int,
    only: GraphName | None = None,
    given: Mapping[str, np.ndarray] | None = None,
) -> Reference:
    """Run the reference on one observation whose prompt is put into `prompt` slots.

    With `only`, one stage of it, fed by the `given` feeds of the stage before: no other weights are needed then.
    Raises InputError for more than one observation, or a prompt that does not fit.
    """
    if len(inputs.tokens) != 1:
        raise InputError(f"{len(inputs.tokens)} observations were given; a proof runs one at a time")
    present = inputs.image_mask[0]
    valid = inputs.tokens[0][inputs.token_mask[0]]
    if len(valid) > prompt:
        raise InputError(f"the prompt has {len(valid)} tokens, more than the {prompt} slots to prove")
    slots = torch.nn.functional.pad(valid, (0, prompt - len(valid)))[None]
    feeds = {IMAGES: inputs.images[0][present], TOKENS: slots, PROMPT_LENGTH: torch.tensor([len(valid)])}
    feeds |= {STATE: inputs.state, NOISE: noise} | {name: torch.from_numpy(a) for name, a in (given or {}).items()}
    with torch.no_grad(), model.taps() as taps:
        if only in (None, "vision"):
            feeds[IMAGE_TOKENS] = model.encode_images(inputs.images, inputs.image_mask)[0][present]
        if only in (None, "prefill"):
            feeds |= _prefill(model, inputs, feeds[IMAGE_TOKENS], prompt)
        if only in (None, "denoise"):
            model.denoise(_cache(model.config, feeds), inputs.state, noise, steps)
    return Reference({name: as_array(value) for name, value in feeds.items()}, _graph_taps(model.config, taps, present))


def _prefill(model: Pi0, inputs: ModelInput, image_tokens: Tensor, prompt: int) -> dict[str, Tensor]:
    """The cache in as many slots as the graph has, by the names of its outputs."""
    every = image_tokens.new_zeros(len(inputs.image_mask[0]), *image_tokens.shape[1:])
    every[inputs.image_mask[0]] = image_tokens
    cache = model.prefill(every[None], inputs.image_mask, inputs.tokens, inputs.token_mask)
    spare = prompt - int(inputs.token_mask.sum())
    layers = zip(cache_names(model.config), (*cache.keys, *cache.values), strict=True)
    return {name: torch.nn.functional.pad(t, (0, 0, 0, spare)) for name, t in layers} | {PREFIX_LENGTH: cache.lengths}


def _cache(config: ModelConfig, feeds: Mapping[str, Tensor]) -> PrefixCache:
    """The valid part of the cache in the feeds."""
    length = int(feeds[PREFIX_LENGTH])
    cut = tuple(feeds[name][:, :, :length] for name in cache_names(config))
    return PrefixCache(cut[: config.vlm.depth], cut[config.vlm.depth :], feeds[PREFIX_LENGTH], None)


def _graph_taps(config: ModelConfig, taps: Mapping[str, Tensor], present: Tensor) -> Arrays:
    """The reference's taps under the graphs' names: cameras stacked, keys and values as they pass between stages."""
    cameras = [camera for camera, valid in enumerate(present.tolist()) if valid]
    found = {}
    for name in (name for name in taps if name.startswith(f"vision.cam{cameras[0]}.")):
        leaf = name.rpartition(".")[2]
        stacked = torch.cat([taps[f"vision.cam{camera}.{leaf}"] for camera in cameras])
        found[IMAGE_TOKENS if leaf == "projected" else f"vision.{leaf}"] = stacked
    for name, value in taps.items():
        head, _, leaf = name.rpartition(".")
        if head == "prefix" and leaf[1:].isdigit():
            found[f"{'keys' if leaf[0] == 'k' else 'values'}_{leaf[1:]}"] = value
        elif name == "actions" or head.startswith("step") or leaf.startswith(("hidden", "embs")):
            found[name] = value
    # What is given or constant in a graph, and what the last layer of the prefix gives to nobody.
    absent = {f"prefix.hidden{config.vlm.depth - 1:02d}", "step0.x_t"}
    absent |= {name for name in found if name.endswith((".time", ".adarms_cond"))}
    return {name: as_array(value) for name, value in sorted(found.items()) if name not in absent}


@contextmanager
def ready(model: ir.Model) -> Iterator[Path]:
    """The graph as a file, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="turbopi-proof-") as directory:
        write_graphs(Path(directory), {"graph.onnx": model})
        yield Path(directory) / "graph.onnx"


def run(path: Path, feeds: Mapping[str, np.ndarray], threads: int = 1) -> Arrays:
    """The outputs of a graph's file on the CPU; of the feeds those are taken that the graph asks for."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Weights stay in the file's pages instead of being copied into another layout: full size must fit.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    asked = {port.name: np.float16 if port.type == "tensor(float16)" else None for port in session.get_inputs()}
    given = {name: feeds[name] if dtype is None else feeds[name].astype(dtype) for name, dtype in asked.items()}
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def prove_graph(
    name: GraphName,
    way: Way,
    weights: Weights,
    spec: ExportSpec,
    expected: Reference,
    quantisation: Quantisation | None = None,
) -> list[TapReading]:
    """Compare every tap that a graph has with the reference's, in the order of computation."""
    prompt = int(expected.feeds[TOKENS].shape[1])
    model, _ = make_graph(name, weights, spec, prompt, quantisation)
    inside = {value.name for node in model.graph for value in node.outputs}
    taps = [tap for tap in expected.taps if tap in inside]
    feeds = dict(expected.feeds)
    if way == "forced" and name == "denoise":
        given = [tap for tap in taps if tap.endswith(".x_t")]
        inject(model, given)
        feeds |= {f"given.{tap}": expected.taps[tap] for tap in given}
    expose(model, taps)
    with ready(model) as path:
        outputs = run(path, feeds)
    return [reading(name, way, tap, outputs[tap], expected.taps[tap]) for tap in taps]


def reading(name: GraphName, way: Way, tap: str, value: np.ndarray, record: np.ndarray) -> TapReading:
    """Compare a graph's value, cut to the reference's valid rows, with the reference's."""
    # Behind the valid rows of a prefix lie those of empty slots, which nobody reads.
    cut = value.astype(np.float64)[tuple(slice(0, size) for size in record.shape)]
    record = record.astype(np.float64)
    difference = cut - record
    relative = float(np.linalg.norm(difference) / np.linalg.norm(record))
    return TapReading(name, way, tap, relative, float(np.abs(difference).max() / np.abs(record).max()))


def prove(
    model: Pi0,
    inputs: ModelInput,
    noise: Tensor,
    spec: ExportSpec,
    quantisation: Quantisation | None = None,
    exported: Pi0 | None = None,
) -> list[TapReading]:
    """Every stage forced and free, and the whole graph, against `model`, for the first of the spec's prompt buckets.

    `exported` is the model whose weights the graphs get, where it is not `model`: a quantised reference has none.
    """
    spec = replace(spec, views=int(inputs.image_mask.sum()))
    expected = reference(model, inputs, noise, spec.steps, spec.prompt_buckets[0])
    weights = weights_of_model(exported or model)
    ways: tuple[tuple[GraphName, Way], ...] = (
        ("vision", "forced"),
        ("prefill", "forced"),
        ("denoise", "forced"),
        ("denoise", "stage"),
        ("whole", "free"),
    )
    return [found for name, way in ways for found in prove_graph(name, way, weights, spec, expected, quantisation)]
