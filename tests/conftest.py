import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
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


@pytest.fixture
def e4m3_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter rounds to E4M3 as a GPU does.

    Its own conversion loses the carry into the exponent, flushes subnormals and makes a number of NaN.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def exact(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if target != tl.float8e4nv or source != tl.float32:
            return convert(data, source, target, rounding)
        floats = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
        return floats.to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(np.shape(data))

    monkeypatch.setattr(interpreter, "_convert_float", exact)
