"""The reference on a CUDA GPU: `make test-gpu`."""

from pathlib import Path

import pytest
import torch

from turbopi.audit.golden import compare, open_golden

pytestmark = pytest.mark.gpu

DATA = Path(__file__).parents[1] / "data"
RECORDS = sorted(path for size in ("tiny", "long") for path in (DATA / size).glob("*.safetensors"))
RAGGED = [path for path in RECORDS if path.parent.name == "tiny" and "openpi" in path.name]


@pytest.mark.parametrize("path", [p for p in RECORDS if "_f32" in p.name], ids=lambda p: p.stem)
def test_every_tap_in_float32(path: Path) -> None:
    golden = open_golden(path)
    assert max(e.relative for e in compare(golden, golden.build(device="cuda"))) <= 1e-5


@pytest.mark.parametrize("path", [p for p in RECORDS if "_bf16" in p.name], ids=lambda p: p.stem)
def test_every_tap_in_bfloat16(path: Path) -> None:
    golden = open_golden(path)
    assert max(e.relative for e in compare(golden, golden.build(device="cuda"))) <= 4e-2


@pytest.mark.parametrize("path", RAGGED, ids=lambda p: p.stem)
def test_same_inputs_same_bits(path: Path) -> None:
    golden = open_golden(path)
    model = golden.build(invalid_tokens="dropped", device="cuda")
    inputs, noise = golden.inputs()
    inputs, noise = inputs.to("cuda"), noise.cuda()
    first = model.sample_actions(inputs, noise)
    assert all(torch.equal(model.sample_actions(inputs, noise), first) for _ in range(20))


@pytest.mark.parametrize("path", [p for p in RAGGED if "_f32" in p.name], ids=lambda p: p.stem)
def test_dropped_agrees_with_masked(path: Path) -> None:
    golden = open_golden(path)
    inputs, noise = golden.inputs()
    inputs, noise = inputs.to("cuda"), noise.cuda()
    dropped, masked = (
        golden.build(invalid_tokens=way, device="cuda").sample_actions(inputs, noise) for way in ("dropped", "masked")
    )
    assert float((dropped - masked).norm() / masked.norm()) <= 2e-6
