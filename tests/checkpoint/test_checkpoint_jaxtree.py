"""The layouts are checked by what the arrays do, with the einsums of a JAX Gemma and SigLIP, and by the way back."""

import pytest
import torch

from turbopi.checkpoint.jaxtree import RULES, core_from_jax, heads_in, places, rules_for
from turbopi.checkpoint.names import parameter_shapes
from turbopi.config import preset
from turbopi.errors import CheckpointError

LLM = "PaliGemma/llm/layers"
IMG = "PaliGemma/img/Transformer/encoderblock"


def parameters(path, array):
    return {name: core_from_jax(array, place) for name, (place, _) in places(path, tuple(array.shape)).items()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("mark", "tower"), [("", "vlm"), ("_1", "expert")])
def test_gemma_attention(mark, tower):
    x, w = torch.randn(5, 12), torch.randn(2, 4, 12, 6)
    got = parameters(f"{LLM}/attn/q_einsum{mark}/w", w)
    q = x @ got[f"{tower}.layers.1.self_attn.q_proj.weight"].T
    close(q.unflatten(-1, (4, 6)), torch.einsum("td,ndh->tnh", x, w[1]))
    w = torch.randn(2, 2, 1, 12, 6)
    got = parameters(f"{LLM}/attn/kv_einsum{mark}/w", w)
    for index, part in enumerate(("k_proj", "v_proj")):
        close(
            (x @ got[f"{tower}.layers.1.self_attn.{part}.weight"].T)[:, None],
            torch.einsum("sd,kdh->skh", x, w[1, index]),
        )
    heads, w = torch.randn(5, 4, 6), torch.randn(2, 4, 6, 12)
    got = parameters(f"{LLM}/attn/attn_vec_einsum{mark}/w", w)
    close(
        heads.flatten(1) @ got[f"{tower}.layers.0.self_attn.o_proj.weight"].T, torch.einsum("tnh,nhd->td", heads, w[0])
    )


@pytest.mark.parametrize(("mark", "tower"), [("", "vlm"), ("_1", "expert")])
def test_gemma_mlp_gate_comes_first(mark, tower):
    x, gating, linear = torch.randn(5, 12), torch.randn(3, 2, 12, 20), torch.randn(3, 20, 12)
    got = parameters(f"{LLM}/mlp{mark}/gating_einsum", gating)
    close(x @ got[f"{tower}.layers.2.mlp.gate_proj.weight"].T, x @ gating[2, 0])
    close(x @ got[f"{tower}.layers.2.mlp.up_proj.weight"].T, x @ gating[2, 1])
    got = parameters(f"{LLM}/mlp{mark}/linear", linear)
    close(torch.ones(20) @ got[f"{tower}.layers.1.mlp.down_proj.weight"].T, torch.ones(20) @ linear[1])


def test_siglip():
    x, kernel, bias = torch.randn(5, 12), torch.randn(2, 12, 3, 4), torch.randn(2, 3, 4)
    path = f"{IMG}/MultiHeadDotProductAttention_0"
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        w = parameters(f"{path}/{theirs}/kernel", kernel)[f"vision.encoder.layers.1.self_attn.{ours}.weight"]
        b = parameters(f"{path}/{theirs}/bias", bias)[f"vision.encoder.layers.1.self_attn.{ours}.bias"]
        close((x @ w.T + b).unflatten(-1, (3, 4)), torch.einsum("td,dnh->tnh", x, kernel[1]) + bias[1])
    heads, out = torch.randn(5, 3, 4), torch.randn(2, 3, 4, 12)
    w = parameters(f"{path}/out/kernel", out)["vision.encoder.layers.0.self_attn.out_proj.weight"]
    close(heads.flatten(1) @ w.T, torch.einsum("tnh,nhd->td", heads, out[0]))
    images, patches = torch.randn(1, 3, 28, 28), torch.randn(14, 14, 3, 8)
    w = parameters("PaliGemma/img/embedding/kernel", patches)["vision.embeddings.patch_embedding.weight"]
    blocks = images.unfold(2, 14, 14).unfold(3, 14, 14)
    close(
        torch.nn.functional.conv2d(images, w.contiguous(), stride=14),
        torch.einsum("bcyxhw,hwco->boyx", blocks, patches),
    )


@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
def test_every_parameter_has_one_place_and_the_way_back_is_the_inverse(kind):
    config, seen = preset(kind), {}
    shapes = parameter_shapes(config)
    for rule, rows, heads in rules_for(set(shapes), config):
        weights = {name: torch.randn(shapes[name]) for row in rows for name in row}
        cores = [torch.stack([rule.layout.to_jax(weights[n], heads) for n in row]) for row in rows]
        array = torch.stack([c if len(rule.parts) > 1 else c[0] for c in cores])
        array = array if rule.stacked else array[0]
        for name, (place, shape) in places(rule.path, tuple(array.shape)).items():
            assert shape == shapes[name]
            assert torch.equal(core_from_jax(array, place), weights[name])
            assert name not in seen
            seen[name] = place
    assert set(seen) == set(shapes)


def test_published_shapes():
    full = {
        f"{LLM}/attn/q_einsum/w": (18, 8, 2048, 256),
        f"{LLM}/attn/kv_einsum_1/w": (18, 2, 1, 1024, 256),
        f"{LLM}/mlp/gating_einsum": (18, 2, 2048, 16384),
        f"{IMG}/MultiHeadDotProductAttention_0/query/kernel": (27, 1152, 16, 72),
        f"{LLM}/pre_attention_norm_1/Dense_0/kernel": (18, 1024, 3072),
        "PaliGemma/img/pos_embedding": (1, 256, 1152),
        "PaliGemma/llm/final_norm_1/Dense_0/bias": (3072,),
        "action_in_proj/kernel": (32, 1024),
    }
    expected = parameter_shapes(preset("pi05"))
    for path, shape in full.items():
        for name, (_, torch_shape) in places(path, shape).items():
            assert torch_shape == expected[name]


def test_head_counts_are_spelled_by_the_shapes():
    shapes = {
        f"{IMG}/MultiHeadDotProductAttention_0/query/kernel": (27, 1152, 16, 72),
        f"{LLM}/attn/q_einsum/w": (18, 8, 2048, 256),
        f"{LLM}/attn/kv_einsum/w": (18, 2, 1, 2048, 256),
    }
    assert heads_in(shapes) == {"vision": {"heads": 16}, "vlm": {"heads": 8, "kv_heads": 1, "head_dim": 256}}


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        (f"{LLM}/mlp/gating_einsum", (18, 3, 8, 8), "expected 2 on axis 1"),
        (f"{LLM}/attn/q_einsum/w", (18, 8), "too few or too many axes"),
        (f"{LLM}/mlp/linear", (), "too few or too many axes"),
        ("PaliGemma/img/embedding/kernel", (14, 14), "too few or too many axes"),
    ],
)
def test_misshapen_arrays_are_named(path, shape, message):
    with pytest.raises(CheckpointError, match=message) as error:
        places(path, shape)
    assert path in str(error.value)


def test_geometry_that_jax_spells_differently_is_refused():
    import dataclasses

    config = preset("pi0-tiny")
    gemma = {tower: dataclasses.replace(getattr(config, tower), kv_heads=8) for tower in ("vlm", "expert")}
    with pytest.raises(CheckpointError, match="not supported"):
        list(rules_for(set(RULES), dataclasses.replace(config, **gemma)))
