import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton kernels run in its interpreter, which must be chosen before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# One thread: with more, torch's CPU float32 is not reproducible from process to process (TRAPS 48).
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent / "model"))


@pytest.fixture(scope="session")
def data() -> Path:
    return Path(__file__).parent / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
