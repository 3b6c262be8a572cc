"""The bytes on the wire: openpi's golden frames, the published client's own packing, and strict reading."""

from __future__ import annotations

import contextlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openpi_client import msgpack_numpy
from serve_fakes import observation

from turbopi.errors import InputError
from turbopi.serve import decode, encode
from turbopi.serve.unpack import Limits

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "io" / "ws_golden.json").read_text())


def golden(name: str) -> bytes:
    return bytes.fromhex(GOLDEN[name])


def same(left: Any, right: Any) -> bool:
    """Equal in type, dtype, shape and every bit."""
    if isinstance(left, np.ndarray):
        return (
            isinstance(right, np.ndarray)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and (left == right or (left != left and right != right))


@pytest.mark.parametrize("name", ["request_hex", "response0_hex", "response1_hex", "metadata_frame_hex"])
def test_golden_frames_are_read_as_openpi_reads_them_and_written_byte_for_byte(name: str) -> None:
    frame = golden(name)
    message = decode(frame)
    assert same(message, msgpack_numpy.unpackb(frame))
    assert encode(message) == frame


def test_golden_request_is_what_it_says() -> None:
    request = decode(golden("request_hex"))
    image = request["observation/image"]
    assert image.dtype == np.uint8
    assert image.shape[-1] == 3
    assert not image.flags.writeable
    assert isinstance(request["prompt"], str)


def test_response_key_order_and_types_match_openpi() -> None:
    response = decode(golden("response1_hex"))
    rebuilt = {**{key: response[key] for key in ("actions", "state", "policy_timing")}}
    rebuilt["server_timing"] = {key: response["server_timing"][key] for key in ("infer_ms", "prev_total_ms")}
    assert encode(rebuilt) == golden("response1_hex")
    assert response["actions"].dtype == np.float32
    assert all(isinstance(value, float) for value in response["server_timing"].values())


arrays = hnp.arrays(
    dtype=st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(),
        hnp.unsigned_integer_dtypes(),
        hnp.floating_dtypes(sizes=(16, 32, 64)),
    ),
    shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)
scalars = st.sampled_from(
    [np.float32(1.5), np.float16(0.5), np.int64(-3), np.uint8(255), np.bool_(True), np.float64(2.5), np.float32("nan")]
)
plain = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=300),
    st.binary(max_size=300),
)
values = st.recursive(
    st.one_of(plain, arrays, scalars),
    lambda inner: st.one_of(st.lists(inner, max_size=20), st.dictionaries(st.text(max_size=40), inner, max_size=20)),
    max_leaves=40,
)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.text(max_size=40), values, max_size=18))
def test_any_message_agrees_with_the_published_client_both_ways(message: dict[str, Any]) -> None:
    packed = msgpack_numpy.packb(message)
    assert encode(message) == packed
    theirs = msgpack_numpy.unpackb(packed, strict_map_key=False)
    ours = decode(packed)
    native = json_like_native(theirs)
    assert same(native, ours)


def json_like_native(value: Any) -> Any:
    """What the published client reads, with big-endian arrays brought to this machine's order as we do."""
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        return value.astype(value.dtype.newbyteorder("="))
    if isinstance(value, dict):
        return {key: json_like_native(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [json_like_native(entry) for entry in value]
    return value


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_random_bytes_are_a_map_or_an_input_error(data: bytes) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(decode(data), dict)


def test_arrays_are_read_only_and_uint8_data_is_not_copied() -> None:
    message = observation(size=64)
    frame = encode(message)
    read = decode(frame)
    whole = np.frombuffer(frame, np.uint8)
    assert np.shares_memory(read["observation/image"], whole)
    for key in ("observation/image", "observation/state"):
        assert same(read[key], message[key])
        assert read[key].flags.aligned
        with pytest.raises(ValueError, match="read-only"):
            read[key][...] = 0


def test_lists_of_text_arrays_and_prompts_of_every_kind_are_read() -> None:
    message = {"prompt": np.array("pick up the cup"), "tags": np.array([b"a", b"bc"]), "raw": b"move"}
    read = decode(msgpack_numpy.packb(message))
    assert read["prompt"].item() == "pick up the cup"
    assert read["tags"].tolist() == [b"a", b"bc"]
    assert read["raw"] == b"move"


def test_long_forms_of_every_length_are_read() -> None:
    message = {"text": "x" * 40_000, "k" * 200: "y" * 300, "list": list(range(400)), "big": np.zeros(70_000, np.uint8)}
    message |= {f"key{index}": {str(inner): inner for inner in range(20)} for index in range(20)}
    assert same(decode(encode(message)), message)
    long_list = {"list": list(range(66_000))}
    assert decode(encode(long_list), Limits(items=100_000)) == long_list
    long_map = {"map": {str(index): index for index in range(66_000)}}
    assert decode(encode(long_map), Limits(items=100_000)) == long_map


def array(**changes: Any) -> bytes:
    """The message {"image": array} with fields of the array changed; None leaves one out."""
    fields = {"__ndarray__": True, "data": bytes(12), "dtype": "|u1", "shape": [2, 2, 3]} | changes
    marked = {key.encode(): value for key, value in fields.items() if value is not None}
    return bytes(msgpack.packb({"image": marked}))


def scalar(value: Any, dtype: Any) -> bytes:
    return bytes(msgpack.packb({"x": {b"__npgeneric__": True, b"data": value, b"dtype": dtype}}))


BAD = {
    "object dtype": (array(dtype="|O"), "image has dtype '|O', expected"),
    "complex dtype": (array(dtype="<c8"), "image has dtype"),
    "structured dtype": (array(dtype=[["a", "<f4"]]), "image has dtype"),
    "void dtype": (array(dtype="|V4"), "image has dtype"),
    "datetime dtype": (array(dtype="<M8[ns]"), "image has dtype"),
    "unknown dtype": (array(dtype="banana"), "image has dtype 'banana'"),
    "odd size": (array(dtype="<f3"), "image has dtype"),
    "long double": (array(dtype="<f16"), "image has dtype"),
    "no dtype order": (array(dtype="u1"), "image has dtype"),
    "data too short": (array(data=bytes(11)), "makes 12 bytes, but 11 came"),
    "data too long": (array(data=bytes(13)), "makes 12 bytes, but 13 came"),
    "data as text": (array(data="x" * 12), "expected msgpack binary"),
    "data as number": (array(data=5), "expected msgpack binary"),
    "negative size": (array(shape=[-2, -2, 3]), "image has shape"),
    "float size": (array(shape=[2.0, 2, 3]), "image has shape"),
    "bool size": (array(shape=[True, 4, 3]), "image has shape"),
    "shape as number": (array(shape=12), "image has shape 12"),
    "too many dimensions": (array(shape=[1] * 9, data=b"1"), "image has shape"),
    "overflowing sizes": (array(shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1], data=b""), "which numpy refuses"),
    "size beyond bounds": (array(shape=[0, 2**40], data=b""), "sizes from 0 to"),
    "missing shape": (array(shape=None), "is neither an array"),
    "marker false": (array(__ndarray__=False), "is neither an array"),
    "extra field": (array(more=1), "is neither an array"),
    "bool of 7": (array(dtype="|b1", data=bytes([7] * 12)), "other than 0 and 1"),
    "not unicode": (array(dtype="<U1", shape=[1], data=b"\xff\xff\xff\xff"), "not Unicode"),
    "lone surrogate": (array(dtype="<U1", shape=[1], data=b"\x00\xd8\x00\x00"), "not Unicode"),
    "endless text array": (array(dtype="<U30000", shape=[1], data=bytes(120_000)), "at most 65536"),
    "scalar out of range": (scalar(256, "|u1"), "which it cannot hold"),
    "scalar bool as int": (scalar(True, "<i4"), "which it cannot hold"),
    "scalar int as bool": (scalar(1, "|b1"), "which it cannot hold"),
    "scalar text": (scalar("1", "<f4"), "which it cannot hold"),
    "scalar of text dtype": (scalar("a", "<U1"), "which it cannot hold"),
    "scalar bytes": (scalar(b"a" * 500, "<f4"), "which it cannot hold"),
    "scalar object": (scalar(None, "|O"), "x has dtype"),
    "not a map": (msgpack.packb([1, 2]), "the message is a msgpack list"),
    "a bare array": (msgpack_numpy.packb(np.zeros(3)), "the message is a msgpack ndarray"),
    "number": (b"\x01", "the message is a msgpack int"),
    "nothing": (b"", "truncated"),
    "trailing bytes": (msgpack.packb({"a": 1}) + b"\x00", "ends after 4 bytes but 5 were sent"),
    "truncated": (encode(observation())[:-1], "prompt: 25 bytes were declared but only 24 are left"),
    "truncated array": (array()[:16], "truncated"),
    "integer key": (msgpack.packb({1: 2}), "keys must be strings"),
    "plain binary key": (msgpack.packb({b"a": 2}), "is neither an array"),
    "long binary key": (msgpack.packb({b"a" * 300: 2}), "at most 256"),
    "long key": (msgpack.packb({"a" * 300: 2}), "at most 256"),
    "key twice": (b"\x82\xa1a\x01\xa1a\x02", "the key 'a' occurs twice"),
    "bad UTF-8": (b"\x81\xa1a\xa1\xff", "a: text is not valid UTF-8"),
    "long prompt": (msgpack.packb({"prompt": "x" * 70_000}), "prompt: 70000 bytes of text"),
    "long bytes": (msgpack.packb({"prompt": b"x" * 70_000}), "prompt: 70000 bytes of text"),
    "extension": (msgpack.packb({"a": msgpack.ExtType(5, b"x")}), "a: msgpack tag 0xd4"),
    "timestamp": (msgpack.packb({"a": msgpack.Timestamp(1)}), "a: msgpack tag 0xd6"),
    "reserved tag": (b"\x81\xa1a\xc1", "a: msgpack tag 0xc1"),
    "deep lists": (b"\x81\xa1a" + b"\x91" * 5000 + b"\x00", "nested more than 16 deep"),
    "deep maps": (b"\x81\xa1a" * 5000, "nested more than 16 deep"),
    "huge list": (b"\x81\xa1a\xdd\xff\xff\xff\xff", "a: the message declares more than"),
    "huge map": (b"\xdf\xff\xff\xff\xff", "the message declares more than"),
    "huge binary": (b"\x81\xa1a\xc6\xff\xff\xff\xff", "a: 4294967295 bytes of text"),
    "huge text": (b"\x81\xa1a\xdb\xff\xff\xff\xff", "a: 4294967295 bytes of text"),
    "huge array data": (
        b"\x81\xa1a\x84" + msgpack.packb(b"__ndarray__") + b"\xc3" + msgpack.packb(b"data") + b"\xc6\xff\xff\xff\xff",
        "a: 4294967295 bytes were declared but only 0 are left",
    ),
    "image as lists": (msgpack.packb({"image": [[0] * 200] * 200}), "]: the message declares more than 10000"),
    "nested key is named": (msgpack.packb({"images": {"cam_high": msgpack.ExtType(1, b"")}}), "images/cam_high: "),
    "endless key is cut": (msgpack.packb({"k" * 200: msgpack.ExtType(1, b"")}), "kkk…: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_refused_with_a_name(name: str) -> None:
    frame, expected = BAD[name]
    with pytest.raises(InputError, match=re.escape(expected)) as caught:
        decode(frame)
    assert len(str(caught.value)) < 600


def test_a_bomb_of_maps_costs_no_memory() -> None:
    import tracemalloc

    bomb = b"\x81\xa1a\xdd" + struct.pack(">I", 4_000_000) + b"\x80" * 4_000_000
    nested = b"\x81\xa1a" + (b"\xdc\x1f\x40" + b"\x80" * 7999) * 400
    tracemalloc.start()
    for frame in (bomb, nested):
        with pytest.raises(InputError, match="declares more than"):
            decode(frame)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, np.complex64), np.zeros(2, "V4"), np.complex64(1)])
def test_encode_refuses_what_openpi_refuses(value: Any) -> None:
    with pytest.raises(ValueError, match="has no form on the wire"):
        encode({"x": value})
    with pytest.raises(ValueError, match="Unsupported dtype"):
        msgpack_numpy.packb({"x": value})


def test_encode_names_a_type_that_has_no_form() -> None:
    with pytest.raises(TypeError, match="a set has no form on the wire"):
        encode({"x": {1}})


def test_encode_writes_strided_arrays_in_c_order() -> None:
    strided = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    assert encode({"a": strided}) == msgpack_numpy.packb({"a": strided})
    assert same(decode(encode({"a": strided}))["a"], np.ascontiguousarray(strided))
