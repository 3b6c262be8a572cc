"""The kernel of `denoise.cu`, the whole denoise loop in one launch: packing, launching, and its plain-torch twin.

For one observation of π0.5 with at most 16 suffix rows, on GPUs of compute capability 9.0 or more, in bfloat16, or with
products of E4M3 by E4M3. What led to this form, and what it is worth, is in docs/denoise-loop.md.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .cuda_module import CudaModule, Launch
from .denoise_fp8 import ScaledMatrix, pack_e4m3

SOURCE = Path(__file__).with_name("denoise.cu")
MAX_ROWS = 16
MAX_INPUT = 16 * 4096
"""Values of a product's input, in all rows: a thread holds all of its part of them in registers."""
RMS_EPS = 1e-6
WARPS = 8
PAIR = 2
"""CTAs that share a tile of `out` and `down`, each over half of K."""
GATE_TILES = 4
CHUNK_BYTES = 16 << 10
IN_FLIGHT, IN_FLIGHT_FP8 = 1, 2
"""Chunks that a CTA asks memory for at once. More queue up, and what CTAs tell each other queues behind them. In fp8 it
asks while it computes, for two."""
STATIC_BYTES = 1 << 10
"""Of shared memory, left for the kernel's own arrays."""
GENERATIONS = 4
EMPTY = -1
"""What a word of mail holds before it is written: a NaN that no arithmetic makes."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the suffix's tower.

    Attributes:
        width, depth, heads, kv_heads, head_dim, mlp_dim: of the action expert.
        rows: suffix tokens.
        longest: prefix and suffix tokens at most.
        action_dim: of x_t.

    Raises:
        ValueError: sizes that the kernel cannot tile, see `problems`.
    """

    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rows: int
    longest: int
    action_dim: int = 32

    def __post_init__(self) -> None:
        if found := self.problems(**{f.name: getattr(self, f.name) for f in fields(self)}):
            raise ValueError(f"the denoise kernel cannot tile this model: {'; '.join(found)}")

    @staticmethod
    def problems(*, width: int, heads: int, head_dim: int, mlp_dim: int, rows: int, **_: int) -> list[str]:
        """Why the kernel cannot tile such a model; empty if it can."""
        units = {"width": (width, 64), "head_dim": (head_dim, 32), "mlp_dim": (mlp_dim, 64)}
        units["heads * head_dim"] = (heads * head_dim, 128)
        found = [f"{name} {value} is not a multiple of {unit}" for name, (value, unit) in units.items() if value % unit]
        if not 1 <= rows <= MAX_ROWS:
            found.append(f"{rows} suffix rows are not 1 to {MAX_ROWS}")
        if rows * max(heads * head_dim, mlp_dim) > MAX_INPUT:
            found.append(f"{rows} rows of {max(heads * head_dim, mlp_dim)} are more than {MAX_INPUT} values")
        return found


def pack(weights: Tensor, tiles: int, parts: int = 1) -> Tensor:
    """Weight rows in the order in which the kernel's lanes consume them.

    weights (rows,K), rows already in tile order -> (units, K/32/parts steps, tiles, 2, 32 lanes, 8), contiguous.
    `parts` units in a row share their rows and divide K.
    """
    rows, k = weights.shape
    steps = k // 32 // parts
    view = weights.reshape(rows // (16 * tiles), tiles, 2, 8, parts, steps, 4, 2, 2, 2)
    # group, tile, upper/lower row, g, part, step, t, half, pair, element -> consumption order
    packed = view.permute(0, 4, 5, 1, 7, 3, 6, 8, 2, 9)
    return packed.reshape(-1, steps, tiles, 2, 32, 8).contiguous()


def qkv_order(shape: Shape) -> Tensor:
    """Row order of cat(q, k, v): in each tile 8 dims of a head's first half, then their rotary partners."""
    rows = torch.arange((shape.heads + 2 * shape.kv_heads) * shape.head_dim)
    return rows.reshape(-1, 2, shape.head_dim // 16, 8).transpose(1, 2).flatten()


def gate_order(shape: Shape) -> Tensor:
    """Row order of cat(gate, up): in each tile 8 rows of gate, then the same 8 of up."""
    return torch.arange(2 * shape.mlp_dim).reshape(2, -1, 8).transpose(0, 1).flatten()


Matrix = Tensor | ScaledMatrix
"""bfloat16, or E4M3."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights, rows by columns: qkv (heads, then keys, then values), out, gate_up, down."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, eq=False)
class Schedule:
    """What depends on the steps, float32.

    modulation (steps, 2·depth+1, 3, width): scale, shift, gate; in_weights (action_dim,width), in_bias (steps,width);
    out_weights (action_dim,width) and out_bias (action_dim,) with -1/steps folded in.
    """

    modulation: Tensor
    in_weights: Tensor
    in_bias: Tensor
    out_weights: Tensor
    out_bias: Tensor


@dataclass(frozen=True, eq=False)
class Cache:
    """keys, values (depth, kv_heads, slots, head_dim); length (1,) int32, valid prefix tokens; cosines, sines tables.

    The tables are (positions, head_dim/2) float32. There is room for the suffix behind the prefix: the twin uses it.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    cosines: Tensor
    sines: Tensor


_POINTERS = (
    "modulation", "qkv", "out", "gate_up", "down", "cosines", "sines", "length", "keys", "values", "x_t", "in_weights",
    "in_bias", "out_weights", "out_bias", "mail", "scales", "inverses",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    _fields_ = [("steps", ctypes.c_int), ("slots", ctypes.c_int), *((name, ctypes.c_void_p) for name in _POINTERS)]


@dataclass(frozen=True)
class Plan:
    """How the kernel is laid out on a GPU: what denoise.cu is compiled with, and how it is launched.

    Attributes:
        shape: that it computes.
        ctas: in all.
        splits: CTAs that share a head's keys.
        keys: of a split, at most.
        slots: of the ring.
        in_flight: chunks of weights that a CTA asks memory for at once.
        fp8: products of E4M3 by E4M3.
    """

    shape: Shape
    ctas: int
    splits: int
    keys: int
    slots: int
    in_flight: int
    fp8: bool = False

    @staticmethod
    def fit(shape: Shape, properties: Any, in_flight: int | None = None, fp8: bool = False) -> Plan:
        """The plan for a device. Raises ValueError where the device is too small."""
        in_flight = in_flight or (IN_FLIGHT_FP8 if fp8 else IN_FLIGHT)
        most = properties.multi_processor_count // PAIR * PAIR
        splits = _power_of_two(min(most // shape.heads, shape.head_dim // 4, 16))
        heads = shape.heads + 2 * shape.kv_heads
        # Phases with a unit a CTA, then phases where a CTA may do several.
        units = shape.width // 8, shape.heads * splits, shape.rows
        more = heads * shape.head_dim // 16, shape.mlp_dim // 8 // GATE_TILES
        shares = (math.ceil(count / math.ceil(count / most)) for count in more)
        ctas = min(most, _up_to(PAIR, max(*units, *shares)))
        if max(units) > ctas:
            raise ValueError(
                f"the denoise kernel needs {max(units)} multiprocessors for this model; {properties.name} has "
                f"{properties.multi_processor_count}"
            )
        keys = _up_to(16, math.ceil(math.ceil(shape.longest / splits) / 8) * 8)
        plan = Plan(shape, ctas, splits, keys, 0, in_flight, fp8)
        slots = min(16, (_shared_memory(properties) - STATIC_BYTES - plan.shared_bytes) // CHUNK_BYTES)
        if slots < 2:
            raise ValueError(
                f"the denoise kernel needs {plan.shared_bytes + 2 * CHUNK_BYTES} bytes of shared memory for this model"
            )
        return replace(plan, slots=slots)

    @property
    def definitions(self) -> dict[str, int]:
        """For the compiler."""
        shape = self.shape
        return {
            "W": shape.width, "H": shape.heads, "KV": shape.kv_heads, "D": shape.head_dim, "F": shape.mlp_dim,
            "N": shape.rows, "A": shape.action_dim, "LAYERS": shape.depth, "GATE": GATE_TILES, "KEYS": self.keys,
            "SPLITS": self.splits, "CTAS": self.ctas, "WARPS": WARPS, "CHUNK": CHUNK_BYTES >> 10, "SLOTS": self.slots,
            "IN_FLIGHT": self.in_flight, "FP8": int(self.fp8),
        }  # fmt: skip

    @property
    def launch(self) -> Launch:
        """For the driver."""
        return Launch(self.ctas, 32 * (WARPS + 1), self.shared_bytes, cluster=PAIR)

    @property
    def mail_words(self) -> int:
        """Words of 4 bytes that CTAs tell each other in one round."""
        shape = self.shape
        inner = shape.heads * shape.head_dim
        inputs = (inner + shape.mlp_dim) // (4 if self.fp8 else 2)  # of `out` and `down`
        words = shape.rows * (shape.width + inner // 2 + inputs + shape.kv_heads * shape.head_dim)
        part = _up_to(2, shape.rows) * shape.head_dim + 2 * shape.rows  # of attention, tokens in pairs
        return _up_to(4, words + shape.heads * self.splits * part)

    @property
    def shared_bytes(self) -> int:
        """Shared memory as denoise.cu lays it out."""
        shape, keys = self.shape, self.keys
        columns = _up_to(8, shape.rows)
        rows = shape.rows * max(shape.width, shape.heads * shape.head_dim // PAIR, shape.mlp_dim // PAIR)
        cache = keys * (2 * shape.head_dim + 40)
        pieces = _up_to(2, shape.rows) * shape.head_dim * 2
        sums = WARPS // 2 * GATE_TILES * 16 * (columns + 8 - columns % 16) * 4
        scores = shape.rows * (shape.head_dim + 32) * 2 + columns * ((keys + 4) * 4 + (keys + 8) * 2)
        shares = self.splits * shape.rows * 4
        hidden = GATE_TILES * 8 // (4 if self.fp8 else 2) * shape.rows * 4  # of a unit
        parts = 2 * max(rows, cache, pieces), max(sums, scores, shares), 2 * 8 * columns * 4, hidden
        return sum(_up_to(128, part) for part in parts) + self.slots * CHUNK_BYTES + 1024


def in_e4m3(layers: Sequence[Layer]) -> bool:
    """Whether all matrices are E4M3; raises ValueError if only some of them are."""
    found = {isinstance(getattr(layer, f.name), ScaledMatrix) for layer in layers for f in fields(layer)}
    if len(found) > 1:
        raise ValueError("the denoise kernel takes matrices in bfloat16 or in E4M3, not some of each")
    return found == {True}


def packed(shape: Shape, layers: Sequence[Layer]) -> dict[str, Tensor]:
    """What the kernel reads of the weights, by the names of its arguments: the matrices, and in E4M3 their scales.

    `scales` (depth, rows of qkv, out, gate_up, down as they are packed) and `inverses` (depth, 4), float32.
    """
    fp8, device = in_e4m3(layers), layers[0].out.device
    orders = {"qkv": qkv_order(shape).to(device), "gate_up": gate_order(shape).to(device)}
    units = {"qkv": (1, 1), "out": (1, PAIR), "gate_up": (GATE_TILES, 1), "down": (1, PAIR)}
    found = {
        name: torch.stack([_pack(getattr(layer, name), orders.get(name), *unit) for layer in layers])
        for name, unit in units.items()
    }
    if fp8:
        scales = ([_in_order(getattr(layer, name).scale, orders.get(name)) for name in units] for layer in layers)
        found["scales"] = torch.stack([torch.cat(of_layer) for of_layer in scales])
        inverses = [[getattr(layer, name).inverse for name in units] for layer in layers]
        found["inverses"] = torch.tensor(inverses, dtype=torch.float32, device=device)
    return found


def _in_order(rows: Tensor, order: Tensor | None) -> Tensor:
    return rows if order is None else rows[order]


def _pack(matrix: Matrix, order: Tensor | None, tiles: int, parts: int) -> Tensor:
    if not isinstance(matrix, ScaledMatrix):
        return pack(_in_order(matrix, order), tiles, parts)
    codes = _in_order(matrix.values.view(torch.uint8), order)  # indexing knows no float8
    return pack_e4m3(codes.view(matrix.values.dtype), tiles, parts)


class DenoiseKernel:
    """The compiled kernel with packed weights and scratch memory, for one shape on one device.

    Its CTAs wait for each other and take the whole GPU: never run two at a time, on different streams of one process.

    Raises:
        ValueError: the device is too small for the shape, or some matrices are E4M3 and some are not.
        RuntimeError: the kernel does not compile here.
    """

    def __init__(
        self, shape: Shape, layers: Sequence[Layer], device: torch.device, in_flight: int | None = None
    ) -> None:
        self.shape, self.device = shape, device
        fp8 = in_e4m3(layers)
        properties = torch.cuda.get_device_properties(device)
        self._plan = plan = Plan.fit(shape, properties, in_flight, fp8)
        self._module = CudaModule(SOURCE, plan.definitions, device)
        if self._module.clusters("denoise", plan.launch) * PAIR < plan.ctas:
            raise ValueError(f"{properties.name} does not hold {plan.ctas} CTAs of the denoise kernel at once")
        self._tensors = packed(shape, layers)
        self._tensors["mail"] = torch.empty(GENERATIONS, plan.mail_words, dtype=torch.int32, device=device)

    def run(self, schedule: Schedule, cache: Cache, x_t: Tensor) -> None:
        """All steps: x_t (rows, action_dim) float32 goes from noise to actions. Twin: `denoise_ref`.

        All tensors contiguous. Only launches: nothing is allocated or waited for.
        """
        self._tensors["mail"].fill_(EMPTY)  # so that no word of an earlier run passes for one of this
        tensors = self._tensors | {"x_t": x_t}
        tensors |= {f.name: getattr(part, f.name) for part in (schedule, cache) for f in fields(part)}
        pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
        arguments = _Arguments(schedule.modulation.shape[0], cache.keys.shape[-2], *map(pointers.get, _POINTERS))
        self._module.launch("denoise", arguments, self._plan.launch)


def _shared_memory(properties: Any) -> int:
    """Bytes that one CTA may ask for; not in every version's type stubs."""
    return int(properties.shared_memory_per_block_optin)


def _up_to(multiple: int, number: int) -> int:
    return math.ceil(number / multiple) * multiple


def _power_of_two(limit: int) -> int:
    return 1 << limit.bit_length() - 1


def _norm(x: Tensor, modulation: Tensor) -> Tensor:
    """Normed and modulated, float32."""
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + RMS_EPS)
    return normed * (1 + modulation[0]) + modulation[1]


def _product(x: Tensor, matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """x (N,K) float32, rounded as this product's input is, by the matrix (rows,K) -> (N,rows) float32."""
    return matrix.product(x) if isinstance(matrix, ScaledMatrix) else x.to(dtype).float() @ matrix.float().T


def _layer_ref(layer: Layer, index: int, modulation: Tensor, cache: Cache, x: Tensor) -> Tensor:
    """One layer on x (rows,width), rounding to x's dtype where the kernel does."""
    keys, values, start = cache.keys[index], cache.values[index], int(cache.length)
    rows, dtype, (kv, _, head_dim) = x.shape[0], x.dtype, keys.shape
    heads = _product(_norm(x, modulation[0]), layer.qkv, dtype).unflatten(-1, (-1, head_dim)).transpose(0, 1)
    c, s = (t[start : start + rows] for t in (cache.cosines, cache.sines))
    first, second = heads[:-kv].chunk(2, dim=-1)
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(dtype)
    keys[:, start : start + rows] = rotated[-kv:]
    values[:, start : start + rows] = heads[-kv:].to(dtype)
    q = rotated[:-kv].float()
    k, v = (t[:, : start + rows].float().repeat_interleave(len(q) // kv, dim=0) for t in (keys, values))
    attended = ((q @ k.transpose(1, 2)).softmax(dim=-1) @ v).transpose(0, 1).flatten(1)
    x = (x.float() + _product(attended, layer.out, dtype) * modulation[0, 2]).to(dtype)
    gate, up = _product(_norm(x, modulation[1]), layer.gate_up, dtype).chunk(2, dim=-1)
    hidden = F.gelu(gate, approximate="tanh") * up
    return (x.float() + _product(hidden, layer.down, dtype) * modulation[1, 2]).to(dtype)


def denoise_ref(layers: Sequence[Layer], schedule: Schedule, cache: Cache, x_t: Tensor) -> None:
    """All steps in plain torch: x_t (rows, action_dim) float32 goes from noise to actions, in place.

    Weights are as they came, not packed. The suffix's keys and values are written behind the prefix's.
    """
    for step, modulation in enumerate(schedule.modulation):
        x = (x_t @ schedule.in_weights + schedule.in_bias[step]).to(layers[0].qkv.dtype)
        for index, layer in enumerate(layers):
            x = _layer_ref(layer, index, modulation[2 * index : 2 * index + 2], cache, x)
        x_t += _norm(x, modulation[-1]) @ schedule.out_weights.T + schedule.out_bias
