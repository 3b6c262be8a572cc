"""Tile configs: checked, found by shape, and the shipped files well formed."""

import dataclasses
import json

import pytest
import torch

from turbopi.kernels import AttentionConfig, GemmConfig, attention, geglu_linear, linear, tuning
from turbopi.kernels.attention import default_config as default_attention
from turbopi.kernels.tuning import PrefixAttentionConfig

ENTRIES = {
    "bfloat16 552x2048x1024": "a",
    "bfloat16 968x2048x1024": "b",
    "float16 552x2048x1024": "c",
    "bfloat16 552x4096x1024": "d",
}


@pytest.mark.parametrize(("rows", "expected"), [(552, "a"), (10, "a"), (553, "b"), (968, "b"), (5000, "b")], ids=str)
def test_the_nearest_row_count_is_used(rows, expected):
    assert tuning.nearest(ENTRIES, torch.bfloat16, (rows, 2048, 1024)) == expected


def test_another_shape_or_dtype_has_no_entry():
    assert tuning.nearest(ENTRIES, torch.float32, (552, 2048, 1024)) is None
    assert tuning.nearest(ENTRIES, torch.bfloat16, (552, 2048, 512)) is None
    assert tuning.nearest(ENTRIES, torch.float16, (552, 2048, 1024)) == "c"
    assert tuning.tuned("linear", GemmConfig, torch.zeros(1), (552, 2048, 1024)) is None


def test_configs_are_read_from_the_gpus_file(tmp_path, monkeypatch):
    config = GemmConfig(128, 64, 64, warps=8)
    file = tmp_path / "nvidia-h200.json"
    entry = {tuning.key(torch.float32, (5, 6, 7)): dataclasses.asdict(config)}
    file.write_text(json.dumps({"configs": {"linear": entry}}))
    monkeypatch.setattr(tuning, "gpu_file", lambda device: file)

    class OnGpu:
        dtype, device = torch.float32, torch.device("cuda")

    tuning.forget()
    assert tuning.tuned("linear", GemmConfig, OnGpu(), (4, 6, 7)) == config
    assert tuning.tuned("attention", AttentionConfig, OnGpu(), (4, 6, 7)) is None
    tuning.forget()


def test_every_gpu_has_a_file_of_its_own(monkeypatch):
    """What is shipped for one GPU is never read on another, not even on one of the same chip."""
    names = ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb")
    files = []
    for name in names:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        files.append(tuning.gpu_file(torch.device("cuda", 0)).name)
    assert files[:2] == ["nvidia-h200.json", "nvidia-h100-80gb-hbm3.json"]
    assert len(set(files)) == len(names)


@pytest.mark.parametrize("file", sorted(tuning.TUNED.glob("*.json")), ids=lambda f: f.name)
def test_shipped_configs_are_valid(file):
    for op, entries in json.loads(file.read_text())["configs"].items():
        if op in ("tiled_vision", "vision_attention"):
            continue  # of several products, and nothing but named: test_kernels_tiled_linear.py
        for entry in entries.values():
            kinds = {"attention": AttentionConfig, "prefix": PrefixAttentionConfig}
            kinds.get(op.partition("_")[0], GemmConfig)(**entry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_m": 24}, "block_m is 24, expected a power of two of at least 16"),
        ({"block_k": 8}, "block_k is 8"),
        ({"warps": 3}, "warps is 3"),
        ({"stages": 0}, "at least 1"),
        ({"splits": 2, "descriptors": True}, "not both"),
        ({"persistent": True}, "needs descriptors"),
    ],
)
def test_bad_tiles_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GemmConfig(**{"block_m": 16, "block_n": 16, "block_k": 16, **arguments})
    with pytest.raises(ValueError, match="block_n is 8"):
        AttentionConfig(16, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 80, 4416])
@pytest.mark.parametrize("head_dim", [16, 72, 256])
def test_default_attention_tiles_fit_the_smallest_shared_memory(rows, head_dim, dtype):
    config = default_attention(rows, head_dim, dtype)
    width = 1 << (head_dim - 1).bit_length()
    assert (config.block_m + 2 * config.stages * config.block_n) * width * dtype.itemsize <= 99 << 10


def test_the_package_names_are_the_operations():
    assert all(callable(op) for op in (attention, geglu_linear, linear))
