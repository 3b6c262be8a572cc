"""Stage 1 with norms behind products: the reference's answer, the same weights, and when it is chosen."""

from dataclasses import replace

import pytest
import torch
from captured_support import model, observation
from fp8_support import calibrated, quantisation_of
from turbo_support import STAGE_TOLERANCE, relative, twins, uint8_input

from turbopi import kernels
from turbopi.engine import base
from turbopi.engine.turbo import TurboEngine, tiled_vision
from turbopi.engine.turbo.buckets import Bucket
from turbopi.engine.turbo.buffers import vision_specs
from turbopi.engine.turbo.ops import twin_ops
from turbopi.kernels import LinearTiling, VisionTilings
from turbopi.quant import quantised
from turbopi.quant.fp8 import Fp8Weight


def tilings(width: int) -> VisionTilings:
    whole = LinearTiling(1, 64)
    return VisionTilings(whole, LinearTiling(1, width // 4), whole, LinearTiling(2, 32, 2), whole, grey=True)


@pytest.fixture
def _tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_vision, "tiled_vision_obstacles", lambda config, weights: [])
    monkeypatch.setattr(kernels, "vision_tilings", lambda fc2, rows: tilings(len(fc2)))


@pytest.mark.usefixtures("_tiled")
@pytest.mark.parametrize("name", ["pi0-small", "pi05-tiny"])
def test_the_answer_is_the_reference(name: str) -> None:
    """From the same folded weights; the stream of the middle of a block has its bias at once."""
    reference = model(name)
    (x, noise), engine = observation(reference.config, [9, 33]), twins(reference)
    got, want = engine.encode_images(x.images, x.image_mask), reference.encode_images(x.images, x.image_mask)
    assert relative(got[x.image_mask], want[x.image_mask]) <= STAGE_TOLERANCE
    assert relative(engine.sample_actions(x, noise, 2), reference.sample_actions(x, noise, 2)) <= STAGE_TOLERANCE
    assert set(engine.describe()["vision"].values()) == {"norms behind products"}


@pytest.mark.usefixtures("_tiled")
def test_in_e4m3_it_is_the_simulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 streams: nothing but the products' rounding is left, and sums in another order may flip one."""
    monkeypatch.setitem(base.DTYPES, "fp8", torch.float32)
    reference = calibrated("pi05-tiny", torch.float32, bare=True)
    quantisation = quantisation_of(reference)
    engine = TurboEngine(reference, "fp8", twin_ops(), None, quantisation=quantisation)
    simulated, errors = quantised(reference, quantisation), []
    for seed in range(5):
        x, _ = observation(reference.config, [9, 33], seed=seed)
        got, want = engine.encode_images(x.images, x.image_mask), simulated.encode_images(x.images, x.image_mask)
        errors.append(relative(got[x.image_mask], want[x.image_mask]))
    assert min(errors) <= STAGE_TOLERANCE, errors
    assert set(engine.describe()["vision"].values()) == {"tiled products in E4M3"}


def test_a_model_in_two_formats_or_of_other_sizes_goes_kernel_by_kernel() -> None:
    reference = model("pi05-tiny")
    x, _ = observation(reference.config, [9, 33])
    engine = twins(reference)
    engine.encode_images(x.images, x.image_mask)
    (told,) = engine.describe()["vision"].values()
    assert "weights in torch.float32" in told
    assert "rows an image, not 72 and 256" in told
    weights = engine._weights.vision
    block = replace(weights.blocks[0], fc2=object.__new__(Fp8Weight))
    quantised = replace(weights, blocks=(block,))
    found = tiled_vision.tiled_vision_obstacles(reference.config.vision, quantised)
    assert found == ["products of the tower in two formats"]
    assert tiled_vision.tiled_vision_obstacles(reference.config.vision, replace(weights, blocks=())) == ["no blocks"]


def test_without_an_entry_it_goes_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled_vision, "tiled_vision_obstacles", lambda config, weights: [])
    reference = model("pi05-tiny")
    x, _ = observation(reference.config, [9, 33])
    engine = twins(reference)
    engine.encode_images(x.images, x.image_mask)
    ((rows, told),) = engine.describe()["vision"].items()
    assert told == f"no entry for {rows} rows in the tuned file"


def test_many_images_take_no_memory_for_moments() -> None:
    config = model("pi05-tiny").config
    few, many = (vision_specs(config, Bucket(batch, 1, 16), torch.bfloat16) for batch in (1, 2000))
    assert few["moments"][0][1] > 0
    assert many["moments"][0][1] == 0


@pytest.mark.usefixtures("_tiled")
def test_grey_levels_give_what_scaled_images_give() -> None:
    """Products of grey levels in bfloat16 are exact, and three parts hold a weight in float32."""
    reference = model("pi05-tiny")
    x, _ = observation(reference.config, [9, 33])
    grey, scaled = uint8_input(x)
    engine = twins(reference)
    got = engine.encode_images(grey.images, x.image_mask)
    want = reference.encode_images(scaled.images, x.image_mask)
    assert relative(got[x.image_mask], want[x.image_mask]) <= STAGE_TOLERANCE


@pytest.mark.usefixtures("_tiled")
def test_an_audit_sees_it_kernel_by_kernel() -> None:
    reference = model("pi05-tiny")
    x, _ = observation(reference.config, [9, 33])
    engine = twins(reference)
    watched = engine.observed(lambda ops: ops)
    assert torch.allclose(
        watched.encode_images(x.images, x.image_mask), engine.encode_images(x.images, x.image_mask), atol=1e-4
    )
    assert set(watched.describe()["vision"].values()) == {"watched kernel by kernel"}
