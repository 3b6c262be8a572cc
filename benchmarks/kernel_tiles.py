"""The tiles that `benchmarks/kernels.py --tune` tries."""

from __future__ import annotations

import itertools

from turbopi.kernels import AttentionConfig, GemmConfig

# Of one program on compute capability 9.0.
SHARED_MEMORY = 227 << 10
Config = GemmConfig | AttentionConfig


def attention_tiles(
    head_dim: int, blocks_m: tuple[int, ...], blocks_n: tuple[int, ...], depths: tuple[int, ...] = (1, 2, 3)
) -> tuple[Config, ...]:
    """Those that fit shared memory."""
    grid = itertools.product(blocks_m, blocks_n, (4, 8), depths)
    fits = [
        AttentionConfig(m, n, warps, stages)
        for m, n, warps, stages in grid
        if (m + 2 * stages * n) * head_dim * 2 <= SHARED_MEMORY
        and not (m < 64 and warps == 8)
        and not (m * head_dim >= 128 * 256 and warps == 4)
    ]
    return tuple(fits)


def few_rows_tiles(m: int, splits: int, gated: bool = False) -> tuple[Config, ...]:
    """One tile of rows; narrow tiles of columns, so that there are enough programs; deep pipelines."""
    block_m = 16 if m <= 16 else 64
    grid = itertools.product((16, 32, 64), (128, 256), (2, 4), (3, 5))
    return tuple(
        GemmConfig(block_m, n, k, group_m=1, warps=warps, stages=stages, splits=splits)
        for n, k, warps, stages in grid
        if (block_m + n * (2 if gated else 1)) * k * 2 * stages <= SHARED_MEMORY and not (block_m == 64 and warps == 2)
    )


def _both_grids(*tiles: tuple[int, int, int, int, int]) -> tuple[Config, ...]:
    return tuple(
        GemmConfig(m, n, k, warps=warps, stages=stages, descriptors=True, persistent=persistent)
        for m, n, k, warps, stages in tiles
        for persistent in (False, True)
    )


LARGE_TILES: tuple[Config, ...] = (
    *(
        GemmConfig(m, n, k, warps=warps, stages=stages)
        for m, n, k, warps, stages in (
            (128, 128, 64, 8, 3),
            (128, 128, 64, 4, 4),
            (128, 256, 64, 8, 3),
            (64, 128, 64, 4, 4),
            (64, 256, 64, 8, 3),
            (128, 64, 64, 4, 4),
            (64, 64, 128, 4, 3),
        )
    ),
    *_both_grids(
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 256, 64, 8, 3),
        (256, 128, 64, 8, 3),
        (64, 128, 64, 4, 5),
        (64, 256, 64, 4, 4),
        (128, 64, 128, 4, 3),
        (64, 64, 128, 4, 4),
    ),
)
GEGLU_TILES: tuple[Config, ...] = (
    *(
        GemmConfig(m, n, k, warps=warps, stages=stages)
        for m, n, k, warps, stages in (
            (128, 64, 64, 8, 3),
            (128, 128, 64, 8, 3),
            (64, 64, 64, 4, 4),
            (64, 128, 64, 8, 3),
        )
    ),
    *_both_grids(
        (128, 128, 64, 8, 3), (128, 64, 64, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 3), (64, 128, 64, 8, 4)
    ),
)
