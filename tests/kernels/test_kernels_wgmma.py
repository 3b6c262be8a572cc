"""The CUDA sources for Hopper compile, keep sums in registers, and multiply without waiting; needs nvcc, no GPU."""

import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from turbopi.kernels.cuda_module import defined

geglu = import_module("turbopi.kernels.tiled_geglu")
attention = import_module("turbopi.kernels.prefix_attention")
FULL = {"K": 2048, "N": 32768}
SOURCES = {
    "tiles of 184": (geglu.SOURCE, FULL | geglu.Tiling(184, 4).definitions),
    "tiles of 200": (geglu.SOURCE, FULL | geglu.Tiling(200, 3).definitions),
    "tiles of 8": (geglu.SOURCE, {"K": 64, "N": 256} | geglu.Tiling(8, 4).definitions),
    "attention": (attention.SOURCE, attention.definitions(256, 6, False)),
    "attention in E4M3": (attention.SOURCE, attention.definitions(256, 4, True)),
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
