"""The kernels compile for the GPUs that are promised, and fit their shared memory, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import turbopi
from turbopi.kernels._triton import GLUON

SCRIPT = Path(__file__).with_name("compile_kernels.py")
PACKAGE = Path(turbopi.__file__).parents[1]


@pytest.mark.parametrize(
    ("capability", "shared_memory", "count"), [(90, 227 << 10, 70 if GLUON else 56), (80, 163 << 10, 10)]
)
def test_compiles_at_the_full_shapes(capability, shared_memory, count):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(PACKAGE)}
    run = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    compiled = [line.split() for line in run.stdout.splitlines()]
    assert len(compiled) == count
    assert not [line for line in compiled if int(line[1]) > shared_memory]


def test_without_triton_the_twins_run_and_a_kernel_says_what_to_install():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import torch
from turbopi import kernels
x = torch.ones(2, 4)
kernels.rms_norm_ref(x, x.clone())
for call in (
    lambda: kernels.rms_norm(x, x),
    lambda: kernels.linear(x, x, torch.zeros(2, 2)),
    lambda: kernels.linear(x, x, torch.zeros(2, 2), config=kernels.GemmConfig(16, 16, 16, descriptors=True)),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE)
    assert run.stdout.count("pip install 'turbo-pi[turbo]'") == 3
