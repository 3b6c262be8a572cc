"""Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is imported."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "Triton was imported before these tests: set TRITON_INTERPRET=1 first, as tests/conftest.py can"
        )
    os.environ["TRITON_INTERPRET"] = "1"

# NumPy's remarks on how the interpreter does its arithmetic.
REMARKS = ("ignore:Conversion of an array:DeprecationWarning", "ignore:.* encountered in:RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith("test_kernels"):
            for remark in REMARKS:
                item.add_marker(pytest.mark.filterwarnings(remark))


@pytest.fixture(autouse=True)
def _as_on_a_gpu(e4m3_in_the_interpreter: None) -> None:
    """Every kernel's test rounds to E4M3 as a GPU does."""
