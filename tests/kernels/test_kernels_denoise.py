"""The denoise kernel: its packing and its twin on the CPU, the kernel itself on a GPU of compute capability 9.0."""

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from turbopi import preset
from turbopi.audit.golden import hash_model
from turbopi.engine.turbo.denoise import Schedules
from turbopi.engine.turbo.weights import fold_model
from turbopi.kernels.denoise import (
    CHUNK_BYTES,
    GATE_TILES,
    STATIC_BYTES,
    Cache,
    DenoiseKernel,
    Layer,
    Plan,
    Schedule,
    Shape,
    denoise_ref,
    gate_order,
    pack,
    qkv_order,
)
from turbopi.model import PrefixCache

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from denoise_loop import Case

FULL = Shape(1024, 3, 8, 1, 256, 4096, 10, longest=978)
SMALL = Shape(192, 6, 8, 1, 32, 640, 10, longest=288)
GROUPED = Shape(256, 2, 8, 2, 64, 512, 7, longest=200)


def consumed(packed: Tensor, rows: Tensor, parts: int) -> Tensor:
    """Weights times rows^T, reading the packed weights as the kernel's lanes do."""
    units, steps, tiles = packed.shape[:3]
    out = torch.zeros(units // parts * tiles * 16, len(rows))
    for unit in range(units):
        for step in range(steps):
            for tile in range(tiles):
                for half in range(2):
                    for lane in range(32):
                        g, t = lane // 4, lane % 4
                        k = (unit % parts * steps + step) * 32 + t * 8 + half * 4
                        a = packed[unit, step, tile, half, lane]
                        row = (unit // parts * tiles + tile) * 16 + g
                        first, second = rows[:, k : k + 2], rows[:, k + 2 : k + 4]
                        out[row] += first @ a[0:2] + second @ a[4:6]
                        out[row + 8] += first @ a[2:4] + second @ a[6:8]
    return out


@pytest.mark.parametrize(("tiles", "parts"), [(1, 1), (4, 1), (1, 2)])
def test_lanes_find_their_weights(tiles: int, parts: int) -> None:
    weights, rows = torch.randn(64, 128), torch.randn(3, 128)
    torch.testing.assert_close(consumed(pack(weights, tiles, parts), rows, parts), weights @ rows.T)


def test_partners_share_a_thread() -> None:
    """The rows of a tile are eight and their eight partners: a rotary pair, or a gate and its up."""
    for order, distance in ((qkv_order(SMALL), SMALL.head_dim // 2), (gate_order(SMALL), SMALL.mlp_dim)):
        tiles = order.view(-1, 2, 8)
        assert torch.equal(tiles[:, 1] - tiles[:, 0], torch.full_like(tiles[:, 0], distance))
        assert torch.equal(order.sort().values, torch.arange(len(order)))


def test_the_twin_is_the_reference() -> None:
    """In float32, with folded weights, all steps."""
    config = preset("pi05-small")
    model = hash_model(config, 3, torch.float32, "cpu")
    weights, folded = fold_model(model), Schedules(model)(3)
    layers = [Layer(b.qkv, b.out, b.gate_up, b.down) for b in weights.expert.blocks]
    assert folded.modulation is not None
    schedule = Schedule(
        folded.modulation,
        folded.action_in.weight.t(),
        folded.action_in.bias,
        folded.action_out.weight,
        folded.action_out.bias,
    )
    length, expert = 37, config.expert
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, expert.depth, expert.kv_heads, length, expert.head_dim, generator=generator)
    noise = torch.randn(1, config.horizon, config.action_dim, generator=generator)
    prefix = PrefixCache(tuple(k[None] for k in keys), tuple(v[None] for v in values), torch.tensor([length]), None)
    with torch.no_grad():
        expected = model.denoise(prefix, torch.zeros(1, 32), noise, 3)[0]
    room = torch.zeros(expert.depth, expert.kv_heads, config.horizon, expert.head_dim)
    cache = Cache(
        torch.cat((keys, room), dim=2), torch.cat((values, room), dim=2), torch.tensor([length]), weights.cos,
        weights.sin,
    )  # fmt: skip
    x_t = noise[0].clone()
    denoise_ref(layers, schedule, cache, x_t)
    assert float((x_t - expected).norm() / (expected - noise[0]).norm()) < 1e-5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"width": 200}, "width 200"),
        ({"head_dim": 72}, "head_dim 72"),
        ({"mlp_dim": 96}, "mlp_dim 96"),
        ({"rows": 50}, "50 suffix rows"),
        ({"mlp_dim": 8192}, "10 rows of 8192"),
    ],
)
def test_what_cannot_be_tiled_is_said(change: dict[str, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        dataclasses.replace(SMALL, **change)


def gpu(multiprocessors: int, shared_bytes: int = 227 << 10) -> SimpleNamespace:
    """What a plan asks of a device. H200 and H100 SXM have 132 multiprocessors, H100 PCIe 114, H20 78."""
    return SimpleNamespace(
        name="a GPU", multi_processor_count=multiprocessors, shared_memory_per_block_optin=shared_bytes
    )


def test_a_plan_fits_its_gpu() -> None:
    """The same plan wherever there are as many multiprocessors: an H100 SXM runs what an H200 runs."""
    assert Plan.fit(FULL, gpu(132)) == Plan.fit(FULL, gpu(133))
    for multiprocessors in (132, 114, 78):
        plan = Plan.fit(SMALL, gpu(multiprocessors))
        assert plan.ctas <= multiprocessors
        assert plan.shared_bytes + STATIC_BYTES <= 227 << 10


def test_the_ring_holds_what_a_cta_multiplies_at_once() -> None:
    """Of π0.5 on an H200 the tiles of gate and up: with less the product waits for memory."""
    plan = Plan.fit(FULL, gpu(132))
    assert plan.slots * CHUNK_BYTES >= GATE_TILES * 16 * FULL.width * 2


def test_odd_tokens_are_told_in_pairs() -> None:
    """Attention's parts, head_dim floats for each split of a head and token."""
    odd, even = (Plan(dataclasses.replace(FULL, rows=rows), 128, 16, 64, 7, 1).mail_words for rows in (9, 10))
    rest = FULL.width + 8 * 256 // 2 + (8 * 256 + 4096) // 2 + 256 + 8 * 16 * 2
    assert even - odd == rest


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (gpu(114), "needs 128 multiprocessors for this model; a GPU has 114"),
        (gpu(170, 99 << 10), "bytes of shared memory for this model"),
    ],
)
def test_a_gpu_that_is_too_small_is_named(device: SimpleNamespace, message: str) -> None:
    """The persistent loop counts that among its obstacles, and another loop runs."""
    with pytest.raises(ValueError, match=message):
        Plan.fit(FULL, device)


GPU_CASES = [
    pytest.param(FULL, 552, 10, None, id="full"),
    pytest.param(FULL, 968, 2, None, id="longest prefix"),
    pytest.param(FULL, 3, 2, 560, id="keys of most CTAs are missing"),
    pytest.param(dataclasses.replace(FULL, rows=16, longest=984), 600, 3, 700, id="sixteen rows"),
    pytest.param(dataclasses.replace(FULL, rows=1, longest=969), 40, 2, None, id="one row"),
    pytest.param(SMALL, 128, 10, None, id="small"),
    pytest.param(GROUPED, 77, 4, 190, id="two key heads, seven rows"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "prefix", "steps", "slots"), GPU_CASES)
def test_the_kernel_equals_its_twin(shape: Shape, prefix: int, steps: int, slots: int | None) -> None:
    """Within the roundings of bfloat16, again and again bit for bit the same, and without touching the cache."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs compute capability 9.0")
    case = Case(shape, prefix, steps, slots=slots)
    before = case.cache.keys.clone()
    kernel = DenoiseKernel(shape, case.layers, torch.device("cuda"))
    answers = []
    for _ in range(5):
        x_t = case.noise.clone()
        kernel.run(case.schedule, case.cache, x_t)
        answers.append(x_t)
    torch.cuda.synchronize()
    assert torch.equal(case.cache.keys, before)
    assert all(torch.equal(answers[0], answer) for answer in answers)
    expected = case.noise.clone()
    denoise_ref(case.layers, case.schedule, case.cache, expected)
    error = float((answers[0] - expected).norm() / (expected - case.noise).norm())
    assert error < 2e-2
