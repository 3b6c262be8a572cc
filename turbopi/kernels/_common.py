"""What every launcher needs: checks with one wording, and block sizes."""

from __future__ import annotations

import torch
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def matrix(name: str, t: Tensor, rows: int | None = None, width: int | None = None) -> tuple[int, int]:
    """The shape of a 2-D tensor whose rows are contiguous; raises ValueError where it is not the expected one."""
    expected = f"({'any' if rows is None else rows}, {'any' if width is None else width})"
    if t.ndim != 2 or rows not in (None, t.shape[0]) or width not in (None, t.shape[1]):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {expected}")
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise ValueError(f"{name} has strides {t.stride()}, expected contiguous rows: call .contiguous() once at load")
    return t.shape[0], t.shape[1]


def dense(name: str, t: Tensor, rows: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Like `matrix`, and with no gap between the rows."""
    shape = matrix(name, t, rows, width)
    if not t.is_contiguous():
        raise ValueError(
            f"{name} has strides {t.stride()}, expected a contiguous tensor: call .contiguous() once at load"
        )
    return shape


def planes(name: str, t: Tensor, rows: int, width: int) -> int:
    """How many planes of (rows, width) a contiguous float32 tensor holds; raises ValueError where it is none."""
    if t.ndim != 3 or t.shape[1:] != (rows, width) or t.dtype != torch.float32 or not t.is_contiguous():
        raise ValueError(
            f"{name} is {t.dtype} {tuple(t.shape)}, expected float32 (splits, {rows}, {width}), contiguous"
        )
    return len(t)


def vector(name: str, t: Tensor | None, width: int, dtype: torch.dtype | None = torch.float32) -> None:
    """Check an optional contiguous vector; `dtype` None takes any."""
    if t is None:
        return
    if t.shape != (width,) or not t.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected a contiguous ({width},)")
    if dtype is not None and t.dtype != dtype:
        raise ValueError(f"{name} is {t.dtype}, expected {dtype}")


def same_dtype(first: str, a: Tensor, second: str, b: Tensor) -> None:
    """Check that two tensors have one dtype."""
    if a.dtype != b.dtype:
        raise ValueError(f"{second} is {b.dtype}, expected the dtype of {first}: {a.dtype}")


def samples(name: str, rows: int, rows_per_sample: int) -> int:
    """How many samples stand in `rows` rows; raises ValueError where they do not divide."""
    if rows_per_sample < 1 or rows % rows_per_sample:
        raise ValueError(f"{name} has {rows} rows, expected a multiple of rows_per_sample = {rows_per_sample}")
    return rows // rows_per_sample


def row_warps(block: int) -> int:
    """Warps for a program that holds one row of `block` elements: about 16 elements a thread."""
    return min(max(block // 512, 1), 8)


def precision(t: Tensor) -> str:
    """How tl.dot multiplies: float32 exactly, so that float32 runs can be compared; half precision has one way."""
    return "ieee" if t.dtype == torch.float32 else "tf32"


def multiprocessors(t: Tensor) -> int:
    """Of the GPU on which `t` is; a small number in the interpreter, so that persistent grids loop there too."""
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 3


def aligned(*tensors: Tensor) -> bool:
    """Whether TMA can read and write them: addresses and rows at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in tensors)
