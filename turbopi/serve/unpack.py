"""A strict msgpack reader for untrusted bytes: bounded depth, item count and text length, and errors with a key.

The msgpack package reads faster, but allocates what a header declares and knows no bound on the number of items: one
64 MiB message of empty maps would take gigabytes. Here nothing is allocated before it has been counted, and array
data stays a view of the message. Observations have a few dozen items, so speed is not at stake.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .arrays import restore, shown

WHOLE = "the message"

_CONSTANTS: dict[int, bool | None] = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    tag: struct.Struct(code)
    for tag, code in {
        0xCA: ">f", 0xCB: ">d",
        0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
        0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
    }.items()
}  # fmt: skip
_BINARY_LENGTHS = {0xC4: struct.Struct(">B"), 0xC5: struct.Struct(">H"), 0xC6: struct.Struct(">I")}
_TEXT_LENGTHS = {0xD9: struct.Struct(">B"), 0xDA: struct.Struct(">H"), 0xDB: struct.Struct(">I")}
_LIST_LENGTHS = {0xDC: struct.Struct(">H"), 0xDD: struct.Struct(">I")}
_MAP_LENGTHS = {0xDE: struct.Struct(">H"), 0xDF: struct.Struct(">I")}


@dataclass(frozen=True)
class Limits:
    """What one message may hold. `text_bytes` bounds each text and each plain byte string (a prompt), not arrays."""

    depth: int = 16
    items: int = 10_000
    text_bytes: int = 65_536
    key_bytes: int = 256


def unpack(data: bytes, limits: Limits) -> Any:
    """Read exactly one msgpack value, arrays restored. Raises InputError for anything else."""
    reader = _Reader(data, limits)
    value = reader.value(WHOLE, depth=0)
    if reader.position != len(data):
        raise InputError(
            f"the message ends after {reader.position} bytes but {len(data)} were sent; send one msgpack map per frame"
        )
    return value


class _Reader:
    """A position in one message. `path` arguments name the key being read, for errors."""

    def __init__(self, data: bytes, limits: Limits) -> None:
        self.view = memoryview(data)
        self.limits = limits
        self.position = 0
        self.items = 0

    def take(self, count: int, path: str) -> memoryview:
        end = self.position + count
        if end > len(self.view):
            raise InputError(
                f"{path}: {count} bytes were declared but only {len(self.view) - self.position} are left; "
                "the msgpack message is truncated or damaged"
            )
        taken = self.view[self.position : end]
        self.position = end
        return taken

    def number(self, form: struct.Struct, path: str) -> Any:
        return form.unpack(self.take(form.size, path))[0]

    def claim(self, count: int, path: str) -> None:
        """Count items before they are read, so that a declared length alone costs nothing."""
        self.items += count
        if self.items > self.limits.items:
            raise InputError(
                f"{path}: the message declares more than {self.limits.items} items; "
                "send images and states as numpy arrays, not as lists"
            )

    def value(self, path: str, depth: int) -> Any:
        if depth > self.limits.depth:
            raise InputError(f"{path}: values are nested more than {self.limits.depth} deep; send a flat observation")
        tag = self.take(1, path)[0]
        if tag < 0x80:
            return tag
        if tag < 0x90:
            return self.map(tag & 0x0F, path, depth)
        if tag < 0xA0:
            return self.list(tag & 0x0F, path, depth)
        if tag < 0xC0:
            return self.text(tag & 0x1F, path)
        if tag >= 0xE0:
            return tag - 0x100
        return self.long_form(tag, path, depth)

    def long_form(self, tag: int, path: str, depth: int) -> Any:
        """Read a value whose tag byte is followed by a number or a length."""
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if tag in _NUMBERS:
            return self.number(_NUMBERS[tag], path)
        if tag in _TEXT_LENGTHS:
            return self.text(self.number(_TEXT_LENGTHS[tag], path), path)
        if tag in _BINARY_LENGTHS:
            return self.plain_bytes(self.number(_BINARY_LENGTHS[tag], path), path)
        if tag in _MAP_LENGTHS:
            return self.map(self.number(_MAP_LENGTHS[tag], path), path, depth)
        if tag in _LIST_LENGTHS:
            return self.list(self.number(_LIST_LENGTHS[tag], path), path, depth)
        raise InputError(f"{path}: msgpack tag 0x{tag:02x} (an extension type) is not used by this protocol")

    def text(self, length: int, path: str, limit: int | None = None) -> str:
        self.check_length(length, self.limits.text_bytes if limit is None else limit, path)
        try:
            return str(self.take(length, path), "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: text is not valid UTF-8 ({error.reason})") from None

    def plain_bytes(self, length: int, path: str) -> bytes:
        self.check_length(length, self.limits.text_bytes, path)
        return bytes(self.take(length, path))

    def check_length(self, length: int, limit: int, path: str) -> None:
        if length > limit:
            raise InputError(f"{path}: {length} bytes of text, expected at most {limit}; send images as numpy arrays")

    def list(self, length: int, path: str, depth: int) -> Any:
        self.claim(length, path)
        return [self.value(f"{path}[{index}]", depth + 1) for index in range(length)]

    def map(self, length: int, path: str, depth: int) -> Any:
        self.claim(length, path)
        entries: dict[str | bytes, Any] = {}
        for _ in range(length):
            key = self.key(path)
            if key in entries:
                raise InputError(f"{path}: the key {shown(key)} occurs twice")
            if key == b"data":
                entries[key] = self.array_data(path, depth)
            else:
                entries[key] = self.value(_join(path, key), depth + 1)
        return restore(entries, path) if any(isinstance(key, bytes) for key in entries) else entries

    def key(self, path: str) -> str | bytes:
        """Read a map's key: text, or binary for the markers of an array."""
        tag = self.take(1, path)[0]
        limit = self.limits.key_bytes
        if 0xA0 <= tag < 0xC0:
            return self.text(tag & 0x1F, path, limit)
        if tag in _TEXT_LENGTHS:
            return self.text(self.number(_TEXT_LENGTHS[tag], path), path, limit)
        if tag in _BINARY_LENGTHS:
            length = self.number(_BINARY_LENGTHS[tag], path)
            self.check_length(length, limit, path)
            return bytes(self.take(length, path))
        raise InputError(f"{path}: a map has a key that is not text (msgpack tag 0x{tag:02x}); keys must be strings")

    def array_data(self, path: str, depth: int) -> Any:
        """Read an array's bytes as a view of the message, or a numpy scalar's plain value."""
        if self.position < len(self.view) and self.view[self.position] in _BINARY_LENGTHS:
            tag = self.take(1, path)[0]
            return self.take(self.number(_BINARY_LENGTHS[tag], path), path)
        return self.value(path, depth + 1)


def _join(path: str, key: str | bytes) -> str:
    if isinstance(key, bytes):  # a marker belongs to the array, which already has a name
        return path
    name = key if len(key) <= 80 else key[:77] + "…"
    return name if path == WHOLE else f"{path}/{name}"
