import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from turbopi.audit.golden import Golden, TapError, compare, open_golden

DATA = Path(__file__).parents[1] / "data"
RECORDS = sorted(path for size in ("tiny", "long") for path in (DATA / size).glob("*.safetensors"))
FLOAT32 = [path for path in RECORDS if "_f32" in path.name]
BFLOAT16 = [path for path in RECORDS if "_bf16" in path.name]
PARITY = Path(__file__).parents[2] / "scripts" / "parity.py"

# What bf16 costs in the actions, largest absolute error (TRAPS, noise floors; JAX against torch: SPEC 5).
BF16_FLOOR = {"pi05": 2.1e-2, "pi0": 4.6e-2}


def ids(path: Path) -> str:
    return path.stem


def worst(errors: list[TapError]) -> TapError:
    return max(errors, key=lambda e: e.relative)


def test_all_records_are_here() -> None:
    assert len(FLOAT32) == 10
    assert len(BFLOAT16) == 10


@pytest.mark.parametrize("path", FLOAT32, ids=ids)
def test_every_tap_in_float32(path: Path) -> None:
    golden = open_golden(path)
    assert worst(compare(golden, golden.build())).relative <= 1e-5


@pytest.mark.parametrize("path", [p for p in FLOAT32 if "openpi" in p.name], ids=ids)
def test_the_default_profile_is_openpi_in_float32(path: Path) -> None:
    golden = open_golden(path)
    assert worst(compare(golden, golden.build("exact"))).relative <= 1e-5


@pytest.mark.parametrize("path", BFLOAT16, ids=ids)
def test_every_tap_in_bfloat16(path: Path) -> None:
    golden = open_golden(path)
    errors = {e.name: e for e in compare(golden, golden.build())}
    actions = next(value for name, _, value in golden.records() if name == "actions")
    assert errors["actions"].max_relative * float(actions.abs().max()) <= BF16_FLOOR[golden.config.kind]
    assert worst(list(errors.values())).relative <= 3.5e-2


@pytest.mark.parametrize("path", [p for p in BFLOAT16 if "jax" not in p.name], ids=ids)
def test_parameters_are_held_in_the_other_implementations_dtypes(path: Path) -> None:
    golden = open_golden(path)
    assert {n: p.dtype for n, p in golden.build().named_parameters()} == golden.parameter_dtypes()


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("cc") is None, reason="MKL is for x86-64")
def test_bit_for_bit_with_the_same_gemm_kernels(tmp_path: Path) -> None:
    """With MKL on the code path of the CPU that made the records, rounding is the same and nothing may differ."""
    command = [sys.executable, PARITY, "--mkl-intel-path", "--out", tmp_path / "out.json", *FLOAT32]
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    rows = [row for row in results["rows"] if "jax" not in row["record"]]
    assert len(rows) == 8
    assert max(row["worst_relative"] for row in rows) <= 1e-6
    different = {row["record"]: row["taps"] - row["bit_equal"] for row in rows if row["taps"] != row["bit_equal"]}
    assert not different


def dropped_and_masked(golden: Golden, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, noise = golden.inputs()
    dropped, masked = (golden.build(invalid_tokens=way).sample_actions(inputs, noise) for way in ("dropped", "masked"))
    return dropped, masked


@pytest.mark.parametrize("path", [p for p in FLOAT32 if "openpi" in p.name], ids=ids)
def test_dropping_invalid_tokens_agrees_with_masking_them(path: Path) -> None:
    dropped, masked = dropped_and_masked(open_golden(path))
    assert float((dropped - masked).norm() / masked.norm()) <= 2e-6


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_ragged_batch_is_its_samples(kind: str) -> None:
    golden = open_golden(DATA / "tiny" / f"openpi_{kind}_tiny_f32.safetensors")
    model = golden.build(invalid_tokens="dropped")
    inputs, noise = golden.inputs()
    together = model.sample_actions(inputs, noise)
    for i in range(golden.batch):
        alone = type(inputs)(**{f: getattr(inputs, f)[i : i + 1] for f in vars(inputs)})
        actions = model.sample_actions(alone, noise[i : i + 1])
        assert float((actions - together[i]).norm() / together[i].norm()) <= 2e-6


@pytest.mark.parametrize("invalid_tokens", ["dropped", "masked"])
def test_nothing_depends_on_what_is_invalid(invalid_tokens: str) -> None:
    golden = open_golden(DATA / "tiny" / "openpi_pi05_tiny_f32.safetensors")
    model = golden.build(invalid_tokens=invalid_tokens)
    inputs, noise = golden.inputs()
    before = model.sample_actions(inputs, noise)
    inputs.images[~inputs.image_mask] = 0.5
    inputs.tokens[~inputs.token_mask] = 7
    assert torch.equal(model.sample_actions(inputs, noise), before)


def test_same_inputs_same_bits() -> None:
    golden = open_golden(DATA / "tiny" / "openpi_pi0_tiny_bf16.safetensors")
    model = golden.build(invalid_tokens="dropped")
    inputs, noise = golden.inputs()
    assert torch.equal(model.sample_actions(inputs, noise), model.sample_actions(inputs, noise))
