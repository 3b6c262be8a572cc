"""The CUDA sources for Hopper compile, keep sums in registers, and multiply without waiting; needs nvcc, no GPU."""

import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch

from turbopi.kernels import E4M3
from turbopi.kernels._wgmma import tile_definitions
from turbopi.kernels.cuda_module import defined

norm = import_module("turbopi.kernels.early_norm")
geglu = import_module("turbopi.kernels.tiled_geglu")
attention = import_module("turbopi.kernels.prefix_attention")
linear = import_module("turbopi.kernels.tiled_linear")
vision = import_module("turbopi.kernels.vision_attention")
cluster = import_module("turbopi.kernels.row_attention_cluster")


def product(features, k, tiling, **epilogue):
    """A product of a SigLIP block."""
    flags = linear._Epilogue(**{"BIAS": 1, "RESIDUAL": 0, "GELU": 0, "NORMED": 0, "MOMENTS": 0} | epilogue)
    return linear.SOURCE, {"K": k, "N": features} | flags._asdict() | tiling.definitions


FULL = {"K": 2048, "N": 32768}
SOURCES = {
    "tiles of 184": (geglu.SOURCE, FULL | tile_definitions(184, 4, torch.bfloat16)),
    "tiles of 200": (geglu.SOURCE, FULL | tile_definitions(200, 3, torch.bfloat16)),
    "tiles of 8": (geglu.SOURCE, {"K": 64, "N": 256} | tile_definitions(8, 4, torch.bfloat16)),
    "tiles of 192 in E4M3": (geglu.SOURCE, FULL | tile_definitions(192, 4, E4M3)),
    "tiles of 200 in E4M3": (geglu.SOURCE, FULL | tile_definitions(200, 3, E4M3)),
    "attention of few rows": (cluster.SOURCE, cluster.definitions(e4m3=False)),
    "attention of few rows to E4M3": (cluster.SOURCE, cluster.definitions(e4m3=True)),
    "attention of one block": (attention.SOURCE, attention.definitions(attention.Tiling(3, 208, False), 128, False)),
    "attention of many": (attention.SOURCE, attention.definitions(attention.Tiling(2, 128, True), 128, False)),
    "attention of batches": (attention.SOURCE, attention.definitions(attention.Tiling(1, 128, True), 64, True)),
    "attention of images": (vision.SOURCE, vision.definitions(16, False)),
    "attention of images in E4M3": (vision.SOURCE, vision.definitions(16, True)),
    "qkv behind a norm": product(3456, 1152, linear.LinearTiling(2, 112), NORMED=16),
    "fc1 of 4 groups": product(4352, 1152, linear.LinearTiling(4, 104), NORMED=12, GELU=1),
    "fc1 in E4M3": product(4352, 1152, linear.LinearTiling(2, 208, 1, 3), GELU=1, NARROW=1, E4M3=1),
    "fc2 in E4M3": product(1152, 4352, linear.LinearTiling(1, 128), RESIDUAL=1, MOMENTS=1, E4M3=1),
    "the norm in front of E4M3": (norm.SOURCE, {"WIDTH": 1152, "WARPS": norm.WARPS}),
    "fc2 in parts": product(1152, 4352, linear.LinearTiling(2, 72, 2), RESIDUAL=1, MOMENTS=1),
}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", SOURCES)
def test_it_compiles_into_registers(name: str, tmp_path: Path) -> None:
    source = tmp_path / "kernel.cu"
    source.write_text(defined(*SOURCES[name]))
    command = ["nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v", "-o"]
    said = subprocess.run([*command, tmp_path / "kernel.cubin", source], capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    assert "0 bytes spill stores" in said.stderr
    assert "serialized" not in said.stderr
