import contextlib
import json
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbopi.checkpoint import tensors as tensors_module
from turbopi.checkpoint.names import from_openpi, to_openpi
from turbopi.checkpoint.tensors import (
    INDEX,
    SafetensorsFile,
    SafetensorsSource,
    TensorInfo,
    open_safetensors,
    read_json,
    read_tensor,
    some,
    write_safetensors,
)
from turbopi.errors import CheckpointError

WEIGHTS = {
    "action_in_proj.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "action_in_proj.bias": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "state_proj.bias": torch.tensor([0.25], dtype=torch.float16),
}


def write(path, weights=WEIGHTS, metadata=None):
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in weights.items()}
    write_safetensors(path, infos, weights.__getitem__, metadata or {})
    return path


def open_safetensors_as_they_are(path):
    return SafetensorsSource([SafetensorsFile(path)], lambda name: name)


def test_what_we_write_the_safetensors_package_reads(tmp_path):
    every = WEIGHTS | {
        "double": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "odd": torch.tensor([True, False, True]),
        "strided": torch.arange(6.0).view(2, 3).T,
    }
    path = write(tmp_path / "a.safetensors", every, {"key": "value"})
    read = safetensors.torch.load_file(path)
    assert set(read) == set(every)
    for name, tensor in every.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert torch.equal(read_tensor(open_safetensors_as_they_are(path), "empty"), every["empty"])
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"key": "value"}


def test_what_the_safetensors_package_writes_we_read(tmp_path, monkeypatch):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "model.safetensors")
    monkeypatch.setattr(tensors_module, "PIECE_BYTES", 8)  # several pieces per tensor
    source = open_safetensors(tmp_path, from_openpi)
    for name, tensor in WEIGHTS.items():
        assert torch.equal(read_tensor(source, name), tensor)
        wide = torch.empty(tensor.shape, dtype=torch.float64)
        source.read_into(name, wide)
        assert torch.equal(wide, tensor.double())


def test_a_tensor_that_differs_from_its_announcement_is_refused(tmp_path):
    with pytest.raises(ValueError, match="announced as"):
        write_safetensors(tmp_path / "a", {"x": TensorInfo((2,), torch.float32)}, lambda name: torch.zeros(3), {})


def shard(directory, first=("action_in_proj.weight",)):
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for name, tensor in WEIGHTS.items():
        parts["a.safetensors" if name in first else "b.safetensors"][name] = tensor
    for file, part in parts.items():
        write(directory / file, part)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_one_source(tmp_path):
    shard(tmp_path)
    source = open_safetensors(tmp_path, from_openpi)
    assert set(source.infos) == set(WEIGHTS)
    assert all(torch.equal(read_tensor(source, name), tensor) for name, tensor in WEIGHTS.items())


def test_broken_shards_are_named(tmp_path):
    shard(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": index["weight_map"] | {"time_mlp_in.bias": "b.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"lack 1 tensors.*time_mlp_in\.bias"):
        open_safetensors(tmp_path, from_openpi)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shards b\.safetensors"):
        open_safetensors(tmp_path, from_openpi)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        open_safetensors(tmp_path, from_openpi)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="neither"):
        open_safetensors(tmp_path, from_openpi)


def test_a_tensor_stored_twice_is_refused(tmp_path):
    write(tmp_path / "model.safetensors", {"state_proj.bias": torch.zeros(1), "other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="stored twice"):
        open_safetensors(tmp_path, lambda name: "state_proj.bias")


def test_truncation_is_seen_when_opening_and_while_reading(tmp_path):
    path = write(tmp_path / "model.safetensors")
    file = SafetensorsFile(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"truncated.*copy or download"):
        SafetensorsFile(path)
    path.write_bytes(whole[:-40])
    last = max(file.slices, key=lambda name: file.slices[name].offset)
    with pytest.raises(CheckpointError, match="ended while reading"):
        file.read_into(last, torch.empty_like(WEIGHTS[last]))
    for length in (0, 5, 20):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut off within its header"):
            SafetensorsFile(path)


def raw(path, header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "corrupt safetensors header"),
        ([1], "not a JSON object"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "unreadable entry"),
        ({"x": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, "unreadable entry"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": ["a", 8]}}, "unreadable entry"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, "needs 8 bytes"),
        ({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, "needs 8 bytes"),
        ({"x": 3}, "unreadable entry"),
    ],
)
def test_bad_headers_are_named(tmp_path, header, message):
    path = raw(tmp_path / "bad.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_damage_never_raises_anything_else(tmp_path, position, value, cut):
    path = write(tmp_path / "model.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[position % len(damaged)] = value
    path.write_bytes(damaged[: len(damaged) - cut])
    with contextlib.suppress(CheckpointError):
        source = open_safetensors(tmp_path, from_openpi)
        for name in source.infos:
            assert read_tensor(source, name).shape == source.infos[name].shape


def test_json_files_that_are_no_objects_are_named(tmp_path):
    path = tmp_path / "config.json"
    for text, message in (("{", "not valid JSON"), ("[]", "JSON list"), ("\xff", "not valid JSON")):
        path.write_bytes(text.encode("latin1"))
        with pytest.raises(CheckpointError, match=message):
            read_json(path)


def test_long_lists_are_cut():
    assert some(["a", "b", "c"], 2) == "a, b, and 1 more"
    assert some(["a"]) == "a"
    assert to_openpi("state_proj.bias") == "state_proj.bias"
