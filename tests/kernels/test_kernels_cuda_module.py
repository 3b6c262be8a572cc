"""Where compiled CUDA sources are kept, with a driver and a compiler that only say what they were asked."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from turbopi.kernels import cuda_module

BINARY = b"a binary"


class Compiler:
    nvrtcResult = SimpleNamespace(NVRTC_SUCCESS=0)  # noqa: N815

    def __init__(self) -> None:
        self.compiled = 0

    def __getattr__(self, name: str) -> Callable[..., tuple[int, ...]]:
        return lambda *_: (0, 1)

    def nvrtcCompileProgram(self, *_: object) -> tuple[int]:  # noqa: N802
        self.compiled += 1
        return (0,)

    def nvrtcGetCUBINSize(self, _: object) -> tuple[int, int]:  # noqa: N802
        return 0, len(BINARY)


class Driver:
    def cuModuleLoadData(self, binary: bytes) -> tuple[int, ...]:  # noqa: N802
        return (0, 1) if len(binary) == len(BINARY) else (200,)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    found = Compiler()
    monkeypatch.setattr(cuda_module, "_bindings", lambda: (Driver(), found))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "kernel.cu").write_text("text\n")
    return found


def start(tmp_path: Path) -> None:
    cuda_module.CudaModule(tmp_path / "kernel.cu", {}, torch.device("cuda"))


@pytest.mark.parametrize("damaged", [b"", b"half"])
def test_a_kept_binary_that_does_not_load_is_compiled_anew(compiler: Compiler, tmp_path: Path, damaged: bytes) -> None:
    for _ in range(2):
        start(tmp_path)
    assert compiler.compiled == 1
    (kept,) = cuda_module.cache_directory().iterdir()
    kept.write_bytes(damaged)
    for _ in range(2):
        start(tmp_path)
    assert compiler.compiled == 2
    assert list(cuda_module.cache_directory().iterdir()) == [kept]


def test_what_cannot_be_kept_is_loaded_all_the_same(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        start(tmp_path)
    assert compiler.compiled == 2
    assert "cannot be kept" in caplog.text


def test_an_empty_cache_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cuda_module.cache_directory() == Path.home() / ".cache" / "turbopi" / "kernels"
