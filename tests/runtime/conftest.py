import sys
from pathlib import Path

import pytest

from turbopi.checkpoint import init_checkpoint

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("runtime") / "pi05", "pi05-tiny", weights="hash", robot="libero")


@pytest.fixture(scope="session")
def pi0_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_checkpoint(tmp_path_factory.mktemp("runtime") / "pi0", "pi0-tiny", weights="hash", robot="libero")
