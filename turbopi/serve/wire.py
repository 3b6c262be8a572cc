"""The bytes on the wire: msgpack with numpy arrays, as openpi's client and server write it (SPEC 4.1).

An array travels as a map with the binary keys `__ndarray__`, `data`, `dtype`, `shape`, a numpy scalar as one with
`__npgeneric__`, `data`, `dtype`. `encode` is for our own messages and relies on the msgpack package. `decode` is for
bytes from strangers: `unpack.py` reads them under limits, and every fault is an `InputError` that names the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from ..errors import InputError
from .unpack import Limits, unpack

REFUSED_KINDS = "VOc"  # structured, object and complex: openpi's peers cannot read them either


def encode(message: Mapping[str, Any]) -> bytes:
    """Pack a message byte for byte as openpi does, keys in the order given.

    Raises TypeError for a value that has no form on the wire, ValueError for an array of a refused dtype.
    """
    packed = msgpack.packb(message, default=_numpy_to_map)
    assert isinstance(packed, bytes)
    return packed


def decode(data: bytes, limits: Limits | None = None) -> dict[str, Any]:
    """Unpack one message: a map with text keys. Arrays come out read-only, uint8 and bool ones without a copy.

    Raises InputError for anything that openpi's client could not have sent, naming the key where there is one.
    """
    message = unpack(data, limits or Limits())
    if not isinstance(message, dict):
        raise InputError(
            f"the message is a msgpack {type(message).__name__}, expected a map from observation keys to values"
        )
    return message


def _numpy_to_map(value: object) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(f"a {type(value).__name__} has no form on the wire; send numpy arrays, numbers, text or maps")
    if value.dtype.kind in REFUSED_KINDS:
        raise ValueError(f"dtype {value.dtype} has no form on the wire; send bool, integer, float or text arrays")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
