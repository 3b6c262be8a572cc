from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from turbopi.checkpoint import hashweights
from turbopi.checkpoint.hashweights import (
    hash_integers,
    hash_normal,
    hash_parameter,
    hash_tensor,
    random_parameter,
    uniform,
)
from turbopi.checkpoint.names import EMBEDDING, EXPERT_HEAD, from_openpi, parameter_shapes
from turbopi.config import preset

DATA = Path(__file__).parents[1] / "data"


def test_parameters_equal_the_fixtures_bit_for_bit(monkeypatch):
    monkeypatch.setitem(hashweights.CHUNKS, "cpu", 1000)  # chunks must not show
    stored = load_file(DATA / "io" / "openpi_pi05_tiny_model.safetensors")
    compared = 0
    for theirs, values in stored.items():
        name = from_openpi(theirs)
        name = EMBEDDING if name == "vlm.lm_head.weight" else name
        if name == EXPERT_HEAD:
            continue
        assert np.array_equal(hash_parameter(name, values.shape, 7).numpy(), values), name
        compared += 1
    assert compared == 111


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_inputs_equal_the_fixtures(kind):
    stored = load_file(DATA / "tiny" / f"openpi_{kind}_tiny_f32.safetensors")
    for name in ("in.image0", "in.image1", "in.image2"):
        assert np.array_equal(hash_tensor(name, stored[name].shape, 7).numpy(), stored[name]), name
    state, tokens, mask = stored["in.state"], stored["in.tokens"], stored["in.token_mask"]
    assert np.array_equal(hash_tensor("in.state", state.shape, 7).numpy() * (state != 0), state)
    assert np.array_equal(hash_integers("in.tokens", tokens.shape, 7, 2, 320).numpy() * mask, tokens)
    assert np.array_equal(hash_normal("in.noise", (2, 10, 32), 7).numpy(), stored["in.noise"])


def test_streams_can_be_entered_anywhere():
    whole = uniform("x", 1000, 3)
    assert torch.equal(uniform("x", 400, 3, start=600), whole[600:])
    assert not torch.equal(uniform("x", 1000, 4), whole)
    assert not torch.equal(uniform("y", 1000, 3), whole)
    assert whole.abs().max() < 0.5
    # Indices wrap at 2^32, also from beyond int32.
    assert torch.equal(uniform("x", 4, 3, start=2**32), whole[:4])
    assert uniform("x", 4, 3, start=2**31 - 2).unique().numel() == 4


def test_integers_stay_in_range():
    values = hash_integers("tokens", (5000,), 7, 3, 9)
    assert values.dtype == torch.int64
    assert set(values.tolist()) == {3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
def test_random_weights_have_the_hashed_ones_spread(kind):
    for name, shape in parameter_shapes(preset(kind)).items():
        hashed, normal = hash_parameter(name, shape, 7), random_parameter(name, shape, 7)
        assert torch.equal(normal, random_parameter(name, shape, 7))
        assert not torch.equal(normal, random_parameter(name, shape, 8))
        if hashed.numel() > 1000:
            assert abs(normal.std() / hashed.std() - 1) < 0.1, name
            assert abs(normal.mean() - hashed.mean()) < 0.1 * hashed.std(), name


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits():
    on_gpu = hash_parameter("expert.norm.weight", (100_003,), 7, "cuda").cpu()
    assert torch.equal(on_gpu, hash_parameter("expert.norm.weight", (100_003,), 7))
