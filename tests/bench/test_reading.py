import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from turbopi.bench.reading import BLOCK, read, read_ref
source = torch.rand(5 * BLOCK)
for programs, turns in ((3, 1), (3, 11), (7, 5)):
    out, expected = (torch.full((programs, BLOCK), float("nan")) for _ in range(2))
    read(source, out, turns)
    read_ref(source, expected, turns)
    assert torch.equal(out, expected), (programs, turns)
"""


def test_the_reading_kernel_reads_everything() -> None:
    """In Triton's interpreter, which must be chosen before Triton is imported: a process of its own."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
