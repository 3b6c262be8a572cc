"""What benchmarks/fp8_kernels.py times: the products of the full model in E4M3, every way to compute each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
from kernel_cases import (
    EXPERT,
    EXPERT_MLP,
    HEAD_DIM,
    HEADS,
    MLP,
    QKV,
    SUFFIX,
    VISION,
    VISION_WIDTH,
    WIDTH,
    Call,
    Case,
    bf16,
)
from torch import Tensor

from turbopi import kernels
from turbopi.engine.turbo import fp8_ops
from turbopi.kernels import E4M3, E4M3_MAX, GemmConfig
from turbopi.quant.fp8 import Fp8Weight, to_fp8_weight

Kind = Literal["plain", "bias", "gelu", "geglu", "stream", "stream bias"]
PREFIX = (560, 968)
"""Rows of the buckets in which `libero` and `full` run."""
VISION_HIDDEN = 4352
INPUT_AMAX, HIDDEN_INVERSE = 5.0, E4M3_MAX / 8.0
LARGE_TILES = tuple(
    GemmConfig(m, n, 128, warps=warps, stages=stages, descriptors=True, persistent=persistent)
    for m, n, warps, stages, persistent in (
        (128, 128, 8, 4, False),
        (128, 128, 8, 4, True),
        (128, 256, 8, 3, False),
        (128, 256, 8, 3, True),
        (64, 128, 4, 4, False),
        (64, 128, 4, 4, True),
        (64, 256, 8, 3, True),
    )
)
GEGLU_TILES = tuple(
    GemmConfig(m, n, 128, warps=8, stages=stages, descriptors=True, persistent=persistent)
    for m, n, stages in ((128, 128, 3), (128, 64, 4), (64, 128, 4))
    for persistent in (False, True)
)
FEW_TILES = tuple((n, k, stages) for n in (16, 32, 64) for k in (128, 256) for stages in (3, 5))
SPLIT_TILES = tuple(
    GemmConfig(m, 128, 128, warps=warps, stages=stages, splits=splits)
    for m, warps, stages, splits in ((128, 8, 3, 2), (128, 8, 3, 3), (128, 8, 3, 4), (64, 4, 4, 2), (64, 4, 4, 4))
)
"""K in parts on more programs, for products onto the stream: their tiles are fewer than the multiprocessors."""
OPS: dict[str, dict[Kind, str]] = {
    "many": {
        "plain": "fp8_linear",
        "bias": "fp8_linear",
        "gelu": "fp8_gelu_linear",
        "geglu": "fp8_geglu_linear",
        "stream": "fp8_stream_linear",
        "stream bias": "fp8_stream_linear",
    },
    "few": {"plain": "linear", "geglu": "geglu_linear", "stream": "linear"},
}
"""Under which names the tuned files keep tiles: for many rows only where Triton beats the library."""


@dataclass
class Fp8Call(Call):
    """A `Call` whose `run` is Triton's, with tiles, and the other ways by name; None of them writes `outputs`."""

    ways: dict[str, Callable[[], Any]]
    sum_errors: Callable[[], dict[str, float]]


@cache
def scratch(splits: int, m: int, n: int) -> Tensor:
    """Where the parts of a product are kept."""
    return torch.empty(splits, m, n, device="cuda")


class Operands:
    """One set of operands of a product of one kind, in E4M3 and in bf16."""

    def __init__(self, m: int, n: int, k: int, kind: Kind) -> None:
        self.kind = kind
        self.x16, self.w16 = bf16(m, k), bf16(n, k, scale=k**-0.5)
        self.bias = bf16(n) if kind in ("bias", "gelu", "stream bias") else None
        self.weight: Fp8Weight = to_fp8_weight(self.w16, INPUT_AMAX)
        self.x = torch.empty(m, k, device="cuda", dtype=E4M3)
        kernels.store_ref(self.x16.float(), self.x, self.weight.inverse)
        self.product, self.product16 = bf16(m, n), bf16(m, n)
        fused = {"gelu": n, "geglu": n // 2}
        self.hidden = torch.empty(m, fused.get(kind, 0), device="cuda", dtype=E4M3)
        self.hidden16 = bf16(m, fused.get(kind, 0))

    @property
    def out(self) -> Tensor:
        """What the product leaves."""
        return self.hidden if self.kind in ("gelu", "geglu") else self.product

    def triton(self, config: GemmConfig | None) -> None:
        """One kernel with everything in it."""
        values, scale = self.weight.values, self.weight.scale
        if self.kind == "geglu":
            kernels.geglu_linear(self.x, values, self.hidden, config, scale, HIDDEN_INVERSE)
        elif self.kind == "gelu":
            more = {"config": config, "scale": scale, "inverse": HIDDEN_INVERSE}
            kernels.linear(self.x, values, self.hidden, self.bias, "gelu", **more)
        else:
            splits = 1 if config is None else config.splits
            sums = scratch(splits, *self.product.shape) if splits > 1 else None
            kernels.linear(self.x, values, self.product, self.bias, config=config, partial=sums, scale=scale)

    def library(self) -> None:
        """cuBLASLt, and a pass over its result where something follows."""
        fp8_ops.library_fp8_matmul(self.x, self.weight, self.product, self.bias)
        self._after()

    def tiled(self, weight: kernels.TiledGeglu) -> None:
        """Hopper's own kernel with everything in it, the weight in its order."""
        kernels.tiled_geglu(self.x, weight, self.hidden, HIDDEN_INVERSE)

    def scaled_mm(self, *, channels: bool, fast: bool) -> None:
        """cuBLASLt's product alone: scales by row and column or two numbers, accumulated fast or exactly."""
        one = self.weight.scale[:1].view(())
        a, b = (fp8_ops.row_scales(self.x), self.weight.scale[None]) if channels else (one, one)
        torch._scaled_mm(
            self.x, self.weight.values.t(), a, b, out_dtype=torch.bfloat16, use_fast_accum=fast, out=self.product
        )

    def sum_errors(self) -> dict[str, float]:
        """Relative error of each way to sum, from the same E4M3 operands: nothing else differs but bf16's rounding."""
        values, scale = self.weight.values, self.weight.scale
        exact = self.x.double() @ values.double().T * scale.double()
        ways = {"triton": partial(kernels.linear, self.x, values, self.product, scale=scale)}
        if len(self.x) > fp8_ops.FEW_ROWS:
            ways |= {name: partial(self.scaled_mm, channels=True, fast=name == "fast") for name in ("fast", "exact")}
        errors = {}
        for name, way in ways.items():
            way()
            errors[name] = float((self.product.double() - exact).norm() / exact.norm())
        return errors

    def plain16(self) -> None:
        """The bf16 engine's way."""
        if self.kind == "gelu":
            torch._addmm_activation(self.bias, self.x16, self.w16.t(), use_gelu=True, out=self.product16)
        elif self.kind == "bias":
            torch.addmm(self.bias, self.x16, self.w16.t(), out=self.product16)
        elif self.kind == "geglu" and len(self.x16) <= fp8_ops.FEW_ROWS:
            kernels.geglu_linear(self.x16, self.w16, self.hidden16)
        elif self.kind in ("stream", "stream bias"):
            torch.addmm(self.product16, self.x16, self.w16.t(), out=self.product16, beta=0.5)
        else:
            torch.mm(self.x16, self.w16.t(), out=self.product16)
            if self.kind == "geglu":
                kernels.geglu(self.product16, self.hidden16)

    def _after(self) -> None:
        if self.kind == "gelu":
            kernels.gelu(self.product, self.hidden, HIDDEN_INVERSE)
        elif self.kind == "geglu":
            kernels.geglu(self.product, self.hidden, HIDDEN_INVERSE)

    def want(self) -> list[Tensor]:
        """What the twins make of it, float32, in E4M3's units where the output is in E4M3."""
        out = torch.empty(self.out.shape, device="cuda")
        values, scale = self.weight.values, self.weight.scale
        if self.kind == "geglu":
            kernels.geglu_linear_ref(self.x, values, out, None, scale)
        else:
            activation: Literal["gelu", "none"] = "gelu" if self.kind == "gelu" else "none"
            kernels.linear_ref(self.x, values, out, self.bias, activation, scale=scale)
        return [(out * HIDDEN_INVERSE).clamp(-E4M3_MAX, E4M3_MAX) if self.out.dtype == E4M3 else out]


def product(m: int, n: int, k: int, kind: Kind) -> Fp8Call:
    """One set of operands of one product."""
    operands = Operands(m, n, k, kind)
    ways = {
        "library": operands.library,
        "bf16": operands.plain16,
        "channel scales": partial(operands.scaled_mm, channels=True, fast=True),
        "two scales": partial(operands.scaled_mm, channels=False, fast=True),
        "exact sums": partial(operands.scaled_mm, channels=True, fast=False),
    }
    if kind == "geglu" and not kernels.geglu_obstacles(n, k, E4M3, operands.x.device):
        weight = operands.weight
        ways["tiled"] = partial(operands.tiled, kernels.tile_geglu(weight.values, weight.scale, weight.inverse))
    return Fp8Call(
        run=operands.triton,
        other=operands.library,
        other_name="library",
        outputs=[operands.out],
        want=operands.want,
        bytes=m * k + n * k + operands.out.numel() * operands.out.itemsize,
        flops=2 * m * n * k,
        ways=ways,
        sum_errors=operands.sum_errors,
    )


def all_cases() -> list[Case]:
    """Every fp8 product of `libero` and `full`."""
    return list(_cases())


def _cases() -> Iterator[Case]:
    for m in VISION:
        yield _case("vision qkv", m, 3 * VISION_WIDTH, VISION_WIDTH, "bias")
        yield _case("vision out", m, VISION_WIDTH, VISION_WIDTH, "stream bias")
        yield _case("vision fc1", m, VISION_HIDDEN, VISION_WIDTH, "gelu")
        yield _case("vision fc2", m, VISION_WIDTH, VISION_HIDDEN, "stream bias")
    for m in PREFIX:
        yield from _gemma("prefix", m, WIDTH, MLP)
    for m in SUFFIX:
        yield from _gemma("expert", m, EXPERT, EXPERT_MLP)


def _gemma(tower: str, m: int, width: int, mlp: int) -> Iterator[Case]:
    yield _case(f"{tower} qkv", m, QKV, width, "plain")
    yield _case(f"{tower} out", m, width, HEADS * HEAD_DIM, "stream")
    yield _case(f"{tower} gate_up", m, 2 * mlp, width, "geglu")
    yield _case(f"{tower} down", m, width, mlp, "stream")


def _case(where: str, m: int, n: int, k: int, kind: Kind) -> Case:
    few = m <= fp8_ops.FEW_ROWS
    tiles = GEGLU_TILES if kind == "geglu" else LARGE_TILES
    if kind.startswith("stream"):
        tiles += SPLIT_TILES
    if few:
        rows = 16 if m <= 16 else 64
        tiles = tuple(GemmConfig(rows, n, k, group_m=1, warps=4, stages=stages) for n, k, stages in FEW_TILES)
    op = OPS["few" if few else "many"][kind]
    # The files name a gated product by its hidden units.
    sizes = (m, n // 2 if few and kind == "geglu" else n, k)
    variant = {"stream": "plain", "stream bias": "bias"}.get(kind, kind)
    return Case(op, f"{where} {m}", sizes, partial(product, m, n, k, kind), tiles, f"fp8 {variant}")
