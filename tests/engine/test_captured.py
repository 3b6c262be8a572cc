"""What the capturing engines do around their graphs, with a recorder that runs the work again instead."""

import numpy as np
import pytest
import torch
from captured_support import Rerun, model, observation, takes_only_what_fits

from turbopi import PrefixCache
from turbopi.engine import create_engine
from turbopi.engine.compiled import BUCKET, CompiledFunctions
from turbopi.engine.graphed import ReferenceFunctions, StageGraphs
from turbopi.engine.packing import in_place, pack
from turbopi.engine.recent import Recent
from turbopi.model.prefix import drop_invalid

RAGGED = [(True, True, False), (True, False, True), (False, False, False)]
BATCHES = {
    "two cameras": ([12], None),
    "one camera": ([12], [(False, True, False)]),
    "no camera": ([5], [(False, False, False)]),
    "no prompt": ([0], None),
    "equally long": ([9, 9], None),
    "ragged": ([40, 3, 17], RAGGED),
}


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_the_references(seed: int) -> None:
    valid = np.random.default_rng(seed).random((3, 20)) < 0.6
    embs = torch.rand(3, 20, 4)
    expected, mask = drop_invalid(embs, torch.from_numpy(valid))
    packing = pack(valid, 1, always_masked=False)
    assert torch.equal(torch.take_along_dim(embs, torch.from_numpy(packing.order)[:, :, None], dim=1), expected)
    assert (mask is None) == (packing.valid is None)
    assert mask is None or np.array_equal(packing.valid, mask.numpy())


@pytest.mark.parametrize(("longest", "length"), [(1, 16), (15, 16), (16, 16), (17, 32)])
def test_buckets_round_up_and_hide_the_rest(longest: int, length: int) -> None:
    valid = np.arange(20) < np.array([[longest], [1]])
    packing = pack(valid, 16, always_masked=True)
    assert packing.length == length
    assert packing.valid is not None
    assert packing.valid.sum(axis=1).tolist() == [longest, 1]
    assert packing.order[0, :longest].tolist() == list(range(longest))


def test_a_full_bucket_without_need_of_a_mask_still_has_one() -> None:
    assert pack(np.ones((1, 16), bool), 16, always_masked=True).valid is not None
    assert pack(np.ones((1, 16), bool), 1, always_masked=False).valid is None


def test_in_place_keeps_every_slot() -> None:
    valid = np.array([[True, False, True]])
    assert in_place(valid).order.tolist() == [[0, 1, 2]]
    assert np.array_equal(in_place(valid).valid, valid)


def test_recent_forgets_what_was_used_longest_ago() -> None:
    recent: Recent[int, str] = Recent(2)
    made: list[int] = []

    def get(key: int) -> str:
        return recent.get(key, lambda: made.append(key) or str(key))

    for key in (1, 2, 1, 3, 1, 2):
        assert get(key) == str(key)
    assert made == [1, 2, 3, 2]
    assert len(recent) == 2
    assert 3 not in recent
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        Recent(0)


@pytest.mark.parametrize("name", ["graphed", "compiled", "compiled-max"])
def test_without_a_gpu_the_error_names_eager(name: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' captures CUDA graphs.*engine 'eager'"):
        create_engine(name, model(), "fp32")


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
@pytest.mark.parametrize("invalid_tokens", ["dropped", "masked"])
@pytest.mark.parametrize("numerics", ["exact", "lerobot"])
def test_the_same_bits_as_the_reference(kind: str, batch: str, invalid_tokens: str, numerics: str) -> None:
    reference = model(kind, invalid_tokens=invalid_tokens, numerics=numerics)
    lengths, cameras = BATCHES[batch]
    inputs, noise = observation(reference.config, lengths, cameras)
    graphs = StageGraphs(reference, ReferenceFunctions(reference), Rerun())
    with torch.no_grad():
        tokens = reference.encode_images(inputs.images, inputs.image_mask)
        cache = reference.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        actions = reference.denoise(cache, inputs.state, noise, 3)
        for _ in range(2):
            assert torch.equal(graphs.encode_images(inputs.images, inputs.image_mask), tokens)
            held = graphs.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
            assert all(torch.equal(a, b) for a, b in zip(held.keys + held.values, cache.keys + cache.values, strict=1))
            assert torch.equal(held.lengths, cache.lengths)
            assert (held.valid is None) == (cache.valid is None)
            assert torch.equal(held.visible, cache.visible)
            assert torch.equal(graphs.denoise(held, inputs.state, noise, 3), actions)
            assert torch.equal(graphs.denoise(cache, inputs.state, noise, 3), actions)


def run(graphs: StageGraphs, length: int, seed: int, steps: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions of the graphs and of the reference, for a prompt of `length`."""
    inputs, noise = observation(graphs.config, [length], seed=seed)
    with torch.no_grad():
        tokens = graphs.encode_images(inputs.images, inputs.image_mask)
        cache = graphs.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        actions = graphs.denoise(cache, inputs.state, noise, steps)
    return actions, graphs.model.sample_actions(inputs, noise, steps)


def test_only_new_shapes_are_recorded() -> None:
    recorder = Rerun()
    reference = model()
    graphs = StageGraphs(reference, ReferenceFunctions(reference), recorder, capacity=2)
    counts = []
    for seed, length in enumerate((10, 10, 11, 10, 12, 11)):
        actions, expected = run(graphs, length, seed)
        assert torch.equal(actions, expected)
        counts.append(recorder.recorded)
    # One for vision; two for every new length; 11 was forgotten for 12 and is recorded again.
    assert counts == [3, 3, 5, 5, 7, 9]
    run(graphs, 11, 9, steps=3)
    assert recorder.recorded == 10


def test_stages_take_only_what_fits() -> None:
    reference = model()
    takes_only_what_fits(StageGraphs(reference, ReferenceFunctions(reference), Rerun()), reference, 2)


def test_a_cache_that_was_written_over_is_refused() -> None:
    reference = model()
    graphs = StageGraphs(reference, ReferenceFunctions(reference), Rerun(), capacity=1)
    inputs, noise = observation(reference.config, [10])
    longer, _ = observation(reference.config, [11])
    with torch.no_grad():
        tokens = graphs.encode_images(inputs.images, inputs.image_mask)
        first = graphs.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        keys, values = (tuple(t.clone() for t in tensors) for tensors in (first.keys, first.values))
        kept = PrefixCache(keys, values, first.lengths.clone(), None)
        expected = graphs.denoise(first, inputs.state, noise, 2)
        graphs.prefill(tokens, longer.image_mask, longer.tokens, longer.token_mask)
        assert torch.equal(graphs.denoise(first, inputs.state, noise, 2), expected), "another shape does not touch it"
        second = graphs.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        third = graphs.prefill(tokens, inputs.image_mask, inputs.tokens, inputs.token_mask)
        with pytest.raises(RuntimeError, match="written over this PrefixCache"):
            graphs.denoise(second, inputs.state, noise, 2)
        assert torch.equal(graphs.denoise(kept, inputs.state, noise, 2), expected)
        with pytest.raises(RuntimeError, match="written over"):
            graphs.denoise(third, inputs.state, noise, 2)


@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
def test_buckets_change_nothing_beyond_rounding(kind: str) -> None:
    reference = model(kind)
    recorder = Rerun()
    graphs = StageGraphs(reference, CompiledFunctions(reference, lambda f: f), recorder, bucket=BUCKET)
    for length in (1, 15, 16, 17, 30):
        actions, expected = run(graphs, length, length)
        assert float((actions - expected).norm() / expected.norm()) <= 1e-5
    images = 2 * reference.config.vision.tokens
    buckets = {-(-(images + length) // BUCKET) for length in (1, 15, 16, 17, 30)}
    assert recorder.recorded == 1 + 2 * len(buckets)


@pytest.mark.parametrize("kind", ["pi0-tiny", "pi05-tiny"])
def test_the_compiler_can_trace_every_stage_whole(kind: str) -> None:
    """With a backend that runs the traced graph as it is: no graph break, and one tracing for all steps."""
    traced = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        traced.append(graph)
        return graph.forward

    reference = model(kind)
    functions = CompiledFunctions(reference, lambda f: torch.compile(f, fullgraph=True, dynamic=False, backend=backend))
    graphs = StageGraphs(reference, functions, Rerun(), bucket=BUCKET)
    for length in (9, 10):
        actions, expected = run(graphs, length, 0, steps=4)
        assert float((actions - expected).norm() / expected.norm()) <= 1e-5
    assert len(traced) == 3


def test_a_mask_that_changes_alone_reaches_the_graph() -> None:
    """The same order of slots, another number of valid ones: only a bucket's mask tells them apart."""
    reference = model()
    graphs = StageGraphs(reference, CompiledFunctions(reference, lambda f: f), Rerun(), bucket=BUCKET)
    for length in (20, 19, 20, 20, 18):
        actions, expected = run(graphs, length, 0)
        assert float((actions - expected).norm() / expected.norm()) <= 1e-5
