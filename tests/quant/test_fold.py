"""Every fold is an identity: the folded form against the reference's modules, float32."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from turbopi import Pi0, preset
from turbopi.audit.golden import hash_model
from turbopi.model.flow import time_schedule
from turbopi.model.gemma import RMSNorm
from turbopi.quant import fold

TOLERANCE = 1e-6
STEPS = 3


@pytest.fixture(params=["pi0-tiny", "pi05-tiny", "pi0-small", "pi05-small"])
def model(request: pytest.FixtureRequest) -> Pi0:
    return hash_model(preset(request.param), 7, torch.float32).requires_grad_(False)


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def bare(x: Tensor) -> Tensor:
    """RMS norm without weight."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def same(a: Tensor, b: Tensor) -> None:
    assert float((a - b).norm() / b.norm()) <= TOLERANCE


def apply(linear: fold.Affine | fold.FoldedAffine[Tensor], x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def test_layer_norm_goes_into_the_linear_behind_it(model: Pi0) -> None:
    tower, x = model.vision, random(5, model.config.vision.width)
    folded = fold.fold_vision(model)
    plain = F.layer_norm(x, x.shape[1:], eps=1e-6)
    same(apply(folded.projector, plain), model.projector(tower.post_layernorm(x)))
    for block, reference in zip(folded.blocks, tower.encoder.layers, strict=True):
        units = model.config.vision.mlp_dim
        same(apply(block.fc1, plain)[:, :units], reference.mlp.fc1(reference.layer_norm2(x)))


@pytest.mark.parametrize(("units", "hidden"), [(1, 64), (63, 64), (64, 128), (4304, 4352)])
def test_there_is_always_a_hidden_unit_to_spare(units: int, hidden: int) -> None:
    assert fold.hidden_width(units) == hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_constant_unit_stays_what_it_is(dtype: torch.dtype) -> None:
    constant = torch.tensor([fold.CONSTANT, 0.0], dtype=dtype)
    assert torch.equal(F.gelu(constant, approximate="tanh"), constant)


def test_a_vision_block_needs_no_bias_on_the_stream(model: Pi0) -> None:
    """As the engine runs it: the attention's bias is seen by the norm at once, and by the stream at the block's end."""
    config = model.config.vision
    x, attended = random(5, config.width), random(5, config.width, seed=1)
    for block, reference in zip(fold.fold_vision(model).blocks, model.vision.encoder.layers, strict=True):
        after_attention = x + reference.self_attn.out_proj(attended)
        expected = after_attention + reference.mlp(reference.layer_norm2(after_attention))
        stream = x + attended @ block.out.T
        hidden = F.gelu(
            apply(block.fc1, F.layer_norm(stream + block.out_bias, (config.width,), eps=1e-6)), approximate="tanh"
        )
        same(stream + hidden @ block.fc2.T, expected)


def test_vision_qkv_is_merged_and_scaled(model: Pi0) -> None:
    x = random(5, model.config.vision.width)
    plain = F.layer_norm(x, x.shape[1:], eps=1e-6)
    for block, reference in zip(fold.fold_vision(model).blocks, model.vision.encoder.layers, strict=True):
        attention, normed = reference.self_attn, reference.layer_norm1(x)
        head_dim = model.config.vision.width // attention.heads
        q, k, v = apply(block.qkv, plain).chunk(3, dim=-1)
        same(q, attention.q_proj(normed) * head_dim**-0.5)
        same(k, attention.k_proj(normed))
        same(v, attention.v_proj(normed))
        same(x @ block.out.T + block.out_bias, attention.out_proj(x))


def test_the_patch_convolution_is_a_product(model: Pi0) -> None:
    config = model.config.vision
    images = random(2, 3, config.image_size, config.image_size)
    patches = F.unfold(images, config.patch_size, stride=config.patch_size).transpose(1, 2)
    folded = fold.fold_vision(model)
    same(patches @ folded.patch.T + folded.position, model.vision.embeddings(images))


@pytest.mark.parametrize("tower", ["vlm", "expert"])
def test_gemma_blocks(model: Pi0, tower: str) -> None:
    config = getattr(model.config, tower)
    x, cond = random(2, 5, config.width), random(2, model.config.expert.width, seed=1)
    blocks = [
        fold.fold_gemma_block(block, fold.Rounding(torch.float32), tower) for block in getattr(model, tower).blocks
    ]
    for block, reference in zip(blocks, getattr(model, tower).blocks, strict=True):
        plain_norm = isinstance(reference.input_layernorm, RMSNorm)
        normed, _ = reference.input_layernorm(x, cond)
        attention = reference.self_attn
        sizes = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
        q, k, v = F.linear(bare(x) if plain_norm else normed, block.qkv).split(sizes, dim=-1)
        same(q, attention.q_proj(normed) * config.head_dim**-0.5)
        same(k, attention.k_proj(normed))
        same(v, attention.v_proj(normed))
        normed, _ = reference.post_attention_layernorm(x, cond)
        gate, up = F.linear(bare(x) if plain_norm else normed, block.gate_up).chunk(2, dim=-1)
        same(gate, reference.mlp.gate_proj(normed))
        same(up, reference.mlp.up_proj(normed))
        assert torch.equal(block.out, attention.o_proj.weight)
        assert torch.equal(block.down, reference.mlp.down_proj.weight)


def test_of_the_last_prefix_layer_only_keys_and_values_are_kept(model: Pi0) -> None:
    folded, last = fold.fold_prefix(model), model.vlm.blocks[-1]
    x = random(1, 5, model.config.vlm.width)
    normed, _ = last.input_layernorm(x)
    k, v = F.linear(bare(x), folded.last_keys_values).chunk(2, dim=-1)
    same(k, last.self_attn.k_proj(normed))
    same(v, last.self_attn.v_proj(normed))
    assert len(folded.blocks) == model.config.vlm.depth - 1


def test_the_embedding_is_shared_and_scaled(model: Pi0) -> None:
    folded, tokens = fold.fold_prefix(model), torch.tensor([[1, 5, 1000]])
    assert folded.embedding.data_ptr() == model.vlm.embed_tokens.weight.data_ptr()
    same(folded.embedding[tokens] * folded.scale, model.vlm.embed(tokens))


def test_the_embedding_scale_follows_the_profile() -> None:
    model = hash_model(dataclasses.replace(preset("pi05-small"), numerics="lerobot"), 7, torch.bfloat16)
    assert fold.fold_prefix(model).scale == float(torch.tensor(model.config.vlm.width**0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("numerics", ["exact", "lerobot", "jax"])
@pytest.mark.parametrize("name", ["pi0-tiny", "pi05-tiny"])
def test_the_suffix_of_every_step(name: str, numerics: str) -> None:
    """Time in biases and modulations: the same suffix tokens, and the same norms, as the reference's own modules."""
    model = hash_model(dataclasses.replace(preset(name), numerics=numerics), 7, torch.float32).requires_grad_(False)
    config, schedule = model.config, fold.make_schedule(model, STEPS)
    state, x_t = random(2, config.state_dim), random(2, config.horizon, config.action_dim, seed=1)
    assert schedule.steps == STEPS
    for step, t in enumerate(time_schedule(STEPS, model.numerics.time)):
        embs, cond = model.embed_suffix(state, x_t, torch.full((2,), t))
        tokens = F.linear(x_t, schedule.action_in.weight, schedule.action_in.bias[step])
        if cond is None:
            folded = fold.fold_expert(model).state
            assert folded is not None
            tokens = torch.cat((apply(folded.state, state)[:, None], apply(folded.mix, F.silu(tokens))), dim=1)
        same(tokens, embs)
        if cond is not None:
            _check_modulation(model, schedule.modulation, step, cond)


def _check_modulation(model: Pi0, table: Tensor | None, step: int, cond: Tensor) -> None:
    assert table is not None
    assert table.shape == (STEPS, 2 * model.config.expert.depth + 1, 3, model.config.expert.width)
    x = random(2, 4, model.config.expert.width, seed=2)
    norms = [n for block in model.expert.blocks for n in (block.input_layernorm, block.post_attention_layernorm)]
    for (scale, shift, gate), norm in zip(table[step], [*norms, model.expert.norm], strict=True):
        normed, reference_gate = norm(x, cond)
        same(bare(x) * (1 + scale) + shift, normed)
        same(gate, reference_gate[0, 0])


def test_a_step_is_one_addition(model: Pi0) -> None:
    x = random(2, 5, model.config.expert.width)
    schedule = fold.make_schedule(model, STEPS)
    cond = random(2, model.config.expert.width, seed=1)
    normed, _ = model.expert.norm(x, cond)
    source = bare(x) if model.config.kind == "pi0" else normed
    same(apply(schedule.action_out, source), -1 / STEPS * model.action_out_proj(normed))


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_is_an_error(steps: int) -> None:
    model = hash_model(preset("pi05-tiny"), 7, torch.float32)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fold.make_schedule(model, steps)


def test_folding_leaves_the_model_as_it_was(model: Pi0) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold.fold_vision(model), fold.fold_prefix(model), fold.fold_expert(model), fold.make_schedule(model, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_in_bf16_weights_are_rounded_once() -> None:
    config = preset("pi05-small")
    exact, rounded = (fold.fold_prefix(hash_model(config, 7, dtype)) for dtype in (torch.float32, torch.bfloat16))
    first, second = exact.blocks[0].gate_up, rounded.blocks[0].gate_up
    assert second.dtype == torch.bfloat16
    # The bf16 model's own rounding, and the fold's.
    assert float((first - second).norm() / first.norm()) <= 2 * 2**-9
