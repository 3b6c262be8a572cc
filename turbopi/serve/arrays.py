"""Marker maps of the wire back to numpy, with every field checked before numpy sees it (SPEC 4.1)."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from ..errors import InputError

MAX_DIMENSIONS = 8
MAX_TEXT_BYTES = 65_536
_ITEM_SIZES = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}
_DTYPE = re.compile(r"[<>|]([biufUS])([1-9][0-9]{0,5})")
_ARRAY_FIELDS = {b"__ndarray__", b"data", b"dtype", b"shape"}
_SCALAR_FIELDS = {b"__npgeneric__", b"data", b"dtype"}


def restore(fields: dict[str | bytes, Any], path: str) -> np.ndarray | np.generic:
    """Turn a map with binary keys into the array (read-only) or scalar that it describes; `path` names it in errors.

    Raises InputError unless it has exactly the fields of one of the two and they agree with each other.
    """
    if fields.keys() == _ARRAY_FIELDS and fields[b"__ndarray__"] is True:
        return _array(fields[b"data"], _dtype(fields[b"dtype"], path), _shape(fields[b"shape"], path), path)
    if fields.keys() == _SCALAR_FIELDS and fields[b"__npgeneric__"] is True:
        return _scalar(fields[b"data"], _dtype(fields[b"dtype"], path), path)
    keys = ", ".join(shown(key) for key in list(fields)[:6])
    raise InputError(
        f"{path}: a map with the keys {keys} is neither an array (__ndarray__, data, dtype, shape) "
        "nor a numpy scalar (__npgeneric__, data, dtype)"
    )


def shown(value: object, limit: int = 80) -> str:
    """Return a value's repr, cut so that a stranger's data cannot fill an error message."""
    text = repr(bytes(value[:limit]) if isinstance(value, memoryview) else value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _dtype(text: Any, path: str) -> np.dtype[Any]:
    match = _DTYPE.fullmatch(text) if isinstance(text, str) else None
    if match is not None:
        kind, size = match[1], int(match[2])
        if kind in "US" or size in _ITEM_SIZES[kind]:
            return np.dtype(text)
    raise InputError(
        f"{path} has dtype {shown(text)}, expected bool, an integer, float16/32/64 or text, such as '|u1' or '<f4'; "
        "object, complex and structured arrays are refused"
    )


def _shape(value: Any, path: str) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) <= MAX_DIMENSIONS and all(_is_size(size) for size in value):
        return tuple(value)
    raise InputError(
        f"{path} has shape {shown(value)}, expected a list of at most {MAX_DIMENSIONS} sizes from 0 to 2147483647"
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _array(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], path: str) -> np.ndarray:
    if not isinstance(data, memoryview):
        raise InputError(f"{path}: an array's data is {shown(data)}, expected msgpack binary")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise InputError(
            f"{path} has shape {shape} and dtype {dtype.str}, which makes {expected} bytes, but {len(data)} came"
        )
    # A view may start at any address; wider items are copied so that torch and numpy get aligned memory.
    source = data if dtype.itemsize == 1 else bytes(data)
    try:
        array: np.ndarray = np.ndarray(shape, dtype, buffer=source)
    except ValueError as error:  # sizes that overflow although a zero among them makes the product 0
        raise InputError(f"{path} has shape {shape}, which numpy refuses: {error}") from None
    _check_content(array, path)
    if not dtype.isnative:
        array = array.astype(dtype.newbyteorder("="))
        array.flags.writeable = False
    return array


def _check_content(array: np.ndarray, path: str) -> None:
    if array.dtype.kind == "b" and array.size and array.view(np.uint8).max() > 1:
        raise InputError(f"{path}: a bool array holds bytes other than 0 and 1")
    if array.dtype.kind in "US" and array.nbytes > MAX_TEXT_BYTES:
        raise InputError(f"{path}: {array.nbytes} bytes of text, expected at most {MAX_TEXT_BYTES}")
    if array.dtype.kind == "U":  # read as UTF-32 first: numpy itself fails with a SystemError on what is no character
        try:
            array.tobytes().decode("utf-32-be" if array.dtype.str[0] == ">" else "utf-32-le")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: a text array holds what is not Unicode ({error.reason})") from None


def _scalar(value: Any, dtype: np.dtype[Any], path: str) -> np.generic:
    kind = dtype.kind
    if kind == "b":
        fits = isinstance(value, bool)
    elif kind in "iu":
        bounds = np.iinfo(dtype)
        fits = isinstance(value, int) and not isinstance(value, bool) and bounds.min <= value <= bounds.max
    else:
        fits = kind == "f" and isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits:
        raise InputError(
            f"{path}: a numpy scalar of dtype {dtype.str} has the value {shown(value)}, which it cannot hold"
        )
    with np.errstate(over="ignore"):  # a float64 beyond float16's range becomes inf, as it does in the client
        scalar = dtype.type(value)
    assert isinstance(scalar, np.generic)
    return scalar
