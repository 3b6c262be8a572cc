"""Images to rows of patches: the patch convolution becomes a product (SPEC 1.1)."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import dense, next_power_of_2
from ._triton import tl, triton


def _check(images: Tensor, out: Tensor, grey_copies: int) -> tuple[int, int, int]:
    """Patches along one side, the patch's side, and the columns of `out`, or of each copy in it."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images have shape {tuple(images.shape)}, expected (n, 3, S, S)")
    if images.dtype not in (torch.uint8, torch.float32):
        raise ValueError(f"images are {images.dtype}, expected uint8 or float32 in [-1, 1]")
    if grey_copies and images.dtype != torch.uint8:
        raise ValueError(f"images are {images.dtype}, expected uint8, which has grey levels")
    rows, width = dense("out", out)
    if grey_copies:
        width //= grey_copies
    count, _, size, _ = images.shape
    side = math.isqrt(rows // count)
    if side * side * count != rows or size % max(side, 1):
        raise ValueError(f"out has {rows} rows for {count} images of {size}x{size}: expected n * (S / patch size)^2")
    patch = size // side
    if width < 3 * patch * patch:
        raise ValueError(f"out is {width} wide, expected at least 3 * {patch} * {patch} for {side}x{side} patches")
    return side, patch, width


def patches_ref(images: Tensor, out: Tensor, grey_copies: int = 0) -> None:
    """Twin of `patches`."""
    side, patch, width = _check(images, out, grey_copies)
    x = images.float()
    if images.dtype == torch.uint8 and not grey_copies:
        x = x / 255.0 * 2.0 - 1.0
    columns = 3 * patch * patch
    grid = x.reshape(len(images), 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(-1, columns)
    for start in range(0, max(grey_copies, 1) * width, width):
        out[:, start : start + columns] = grid.to(out.dtype)
        out[:, start + columns : start + width] = 0


@triton.jit
def _patches(
    images,
    out,
    width,
    stride_image,
    stride_channel,
    stride_y,
    stride_x,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    SCALED: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    image, token = row // (SIDE * SIDE), row % (SIDE * SIDE)
    column = tl.arange(0, BLOCK)
    channel, inner = column // (PATCH * PATCH), column % (PATCH * PATCH)
    y = token // SIDE * PATCH + inner // PATCH
    x = token % SIDE * PATCH + inner % PATCH
    source = images + image.to(tl.int64) * stride_image + channel * stride_channel + y * stride_y + x * stride_x
    in_patch = column < 3 * PATCH * PATCH
    f = tl.load(source, mask=in_patch, other=0).to(tl.float32)
    if SCALED:
        f = f / 255.0 * 2.0 - 1.0
    f = tl.where(in_patch, f, 0.0)
    start = out + row.to(tl.int64) * COPIES * width + column
    for copy in tl.static_range(COPIES):
        tl.store(start + copy * width, f.to(out.dtype.element_ty), mask=column < width)


def patches(images: Tensor, out: Tensor, grey_copies: int = 0) -> None:
    """images (n,3,S,S) -> out (n*tokens, 3*p*p): each row a patch, columns in the convolution weight's order.

    images are float32 in [-1, 1], or uint8, which becomes x/255*2 - 1 on the device; any strides, so that a permuted
    view of (n,S,S,3) needs no copy. p follows from the rows of `out`. `out` may be wider, for a product that wants
    aligned columns: these are set to zero. `grey_copies`: uint8 stays 0 to 255, which bfloat16 holds exactly, and `out`
    has as many copies beside one another, for a weight in as many parts. Raises ValueError where shapes do not fit.
    """
    side, patch, width = _check(images, out, grey_copies)
    block = next_power_of_2(width)
    _patches[(out.shape[0],)](
        images,
        out,
        width,
        *images.stride(),
        SIDE=side,
        PATCH=patch,
        SCALED=images.dtype == torch.uint8 and not grey_copies,
        COPIES=max(grey_copies, 1),
        BLOCK=block,
        num_warps=4,
    )
