"""Which stages run at which tick, and what the actions are then."""

import dataclasses
from typing import Any

import pytest
import torch
from runtime_support import Counting, eager, inputs, noise, play, runtime, turbo

from turbopi.engine.eager import EagerEngine
from turbopi.engine.graphed import ReferenceFunctions, StageGraphs
from turbopi.model import PrefixCache
from turbopi.runtime import MixtureError, ReuseConfig
from turbopi.runtime.snapshot import check_mixture

ENGINES = {"eager": eager, "turbo": turbo}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return ENGINES[request.param]()


def test_without_reuse_everything_runs_but_for_what_is_identical(engine: Any) -> None:
    ticks = runtime(engine)
    assert play(ticks, [0, 1, 1, 2, 1]) == ["full", "full", "exact", "full", "full"]
    assert ticks.report()["reuse_rate"] == pytest.approx(0.2)


def test_exact_reuse_gives_the_same_bits(engine: Any) -> None:
    ticks, x = runtime(engine), inputs(engine.config)
    first, _ = ticks.sample(x, noise(engine.config), 6)
    again, report = ticks.sample(x, noise(engine.config), 6)
    assert report.decision.kind == "exact"
    assert torch.equal(first, again)


def test_exact_reuse_takes_the_new_noise_and_state() -> None:
    engine = eager("pi0-tiny")
    ticks = runtime(engine)
    x, other = inputs(engine.config), inputs(engine.config)
    other.state.add_(0.1)
    play(ticks, [0])
    actions, report = ticks.sample(other, noise(engine.config, 5), 9)
    assert report.decision.kind == "exact"
    assert torch.equal(actions, engine.model.sample_actions(other, noise(engine.config, 5), 2))
    assert not torch.equal(x.state, other.state)


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_a_fixed_frequency(engine: Any, every: int) -> None:
    ticks = runtime(engine, reuse=ReuseConfig(every=every))
    kinds = play(ticks, list(range(10)))
    assert kinds == ["full" if tick % every == 0 else "fast" for tick in range(10)]
    assert ticks.report()["ages"] == {str(age): 10 // every + (age < 10 % every) for age in range(every)}


def test_a_fast_tick_runs_the_last_stage_alone() -> None:
    for make, full, fast in (
        (eager, ["encode_images", "prefill", "denoise"], ["denoise"]),
        (turbo, ["sample_actions"], ["sample_again"]),
    ):
        engine = make()
        count, ticks = Counting(engine), runtime(engine, reuse=ReuseConfig(every=2))
        play(ticks, [0])
        assert count.take() == full
        play(ticks, [1])
        assert count.take() == fast


def test_a_fast_tick_is_denoise_over_the_old_prefix_with_the_new_state() -> None:
    engine = eager("pi0-tiny")
    ticks = runtime(engine, reuse=ReuseConfig(every=2))
    old, new = inputs(engine.config, 0), inputs(engine.config, 1)
    ticks.sample(old, noise(engine.config), 9)
    new.tokens.copy_(old.tokens)
    actions, _ = ticks.sample(new, noise(engine.config, 1), 9)
    tokens = engine.encode_images(old.images, old.image_mask)
    cache = engine.prefill(tokens, old.image_mask, old.tokens, old.token_mask)
    assert torch.equal(actions, engine.denoise(cache, new.state, noise(engine.config, 1), 2))


def test_turbos_fast_tick_is_eagers() -> None:
    fast, slow = runtime(turbo(), reuse=ReuseConfig(every=3)), runtime(eager(), reuse=ReuseConfig(every=3))
    config = fast.engine.config
    for seed in range(5):
        x, start = inputs(config, seed), noise(config, seed)
        ours, theirs = fast.sample(x, start, 6)[0], slow.sample(x, start, 6)[0]
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_another_prompt_or_camera_computes_everything(engine: Any) -> None:
    ticks = runtime(engine, reuse=ReuseConfig(every=5))
    config = engine.config
    play(ticks, [0, 1])
    other = inputs(config, 2)
    other.tokens[0, 2] = 77
    assert ticks.sample(other, noise(config), 6)[1].decision.reason == "another prompt or other cameras"
    gone = inputs(config, 3)
    gone.tokens[0, 2] = 77
    gone.image_mask[0, 1] = False
    assert ticks.sample(gone, noise(config), 6)[1].decision.kind == "full"
    assert play(ticks, [4]) == ["full"]


def test_reset_forgets(engine: Any) -> None:
    ticks = runtime(engine, reuse=ReuseConfig(every=5))
    play(ticks, [0, 1])
    ticks.reset()
    assert ticks.report()["ticks"] == 0
    assert play(ticks, [1]) == ["full"]


def test_two_clients_of_one_engine_do_not_meet(engine: Any) -> None:
    """Each reuses its own snapshot, though the engine has computed the other's over it."""
    alone = runtime(ENGINES[engine.name](), reuse=ReuseConfig(every=4))
    config, first = engine.config, runtime(engine, reuse=ReuseConfig(every=4))
    second = runtime(engine, reuse=ReuseConfig(every=4))
    for seed in range(8):
        x, start = inputs(config, seed), noise(config, seed)
        expected = alone.sample(x, start, 6)[0]
        assert torch.allclose(first.sample(x, start, 6)[0], expected, atol=1e-5)
        second.sample(inputs(config, 100 + seed), start, 6)


def test_an_identical_frame_is_computed_again_where_its_cache_is_gone() -> None:
    engine = turbo()
    first, second = runtime(engine), runtime(engine)
    play(first, [0])
    play(second, [1])
    _, report = first.sample(inputs(engine.config, 0), noise(engine.config), 6)
    assert (report.decision.kind, report.decision.reason) == ("full", "identical, but computed over")


# Modes


@pytest.mark.parametrize(
    ("mode", "old"),
    [("vision_only", {"camera0", "camera1"}), ("state_only", {"state"}), ("text_fixed", {"text"})],
)
def test_modality_modes_take_their_parts(mode: Any, old: set[str]) -> None:
    engine = eager()
    ticks = runtime(engine, reuse=ReuseConfig(mode=mode, every=3))
    assert play(ticks, [0, 1, 2, 3, 4]) == ["full", "part", "part", "full", "part"]
    _, report = ticks.sample(inputs(engine.config, 5), noise(engine.config), 6)
    assert report.decision.reused == old
    assert report.age == 2


def test_vision_only_keeps_image_rows_and_sees_the_new_prompt() -> None:
    engine = eager()
    ticks = runtime(engine, reuse=ReuseConfig(mode="vision_only", every=3))
    play(ticks, [0])
    old, new = inputs(engine.config, 0), inputs(engine.config, 1, state=5)
    actions, _ = ticks.sample(new, noise(engine.config), 6)
    whole = engine.model.sample_actions(new, noise(engine.config), 2)
    stale = engine.model.sample_actions(old, noise(engine.config), 2)
    assert not torch.allclose(actions, whole, atol=1e-4)
    assert not torch.allclose(actions, stale, atol=1e-4)


def test_layer_wise_with_no_layers_is_old_image_tokens() -> None:
    engine = eager()
    ticks = runtime(engine, reuse=ReuseConfig(mode="layer_wise", layers=0, every=3))
    play(ticks, [0])
    new = inputs(engine.config, 1)
    actions, _ = ticks.sample(new, noise(engine.config), 6)
    new.images.copy_(inputs(engine.config, 0).images)
    assert torch.allclose(actions, engine.model.sample_actions(new, noise(engine.config), 2), atol=1e-4)


@pytest.mark.parametrize("make", [eager, turbo])
def test_state_only_of_pi0_is_the_old_state_token(make: Any) -> None:
    engine = make("pi0-tiny")
    ticks = runtime(engine, reuse=ReuseConfig(mode="state_only", every=3))
    model = eager("pi0-tiny").model
    old = inputs(engine.config, 0)
    ticks.sample(old, noise(engine.config), 9)
    for seed in (1, 2):
        new = inputs(engine.config, seed)
        new.tokens.copy_(old.tokens)
        actions, report = ticks.sample(new, noise(engine.config), 9)
        assert report.age == seed
        new.state.copy_(old.state)
        assert torch.allclose(actions, model.sample_actions(new, noise(engine.config), 2), atol=1e-4)
    assert play(ticks, [3], text=9) == ["full"]


def test_text_without_an_end() -> None:
    """The text alone may stay until it changes."""
    ticks = runtime(eager(), reuse=ReuseConfig(mode="text_fixed"))
    assert play(ticks, [0, 1, 2, 3, 4, 5]) == ["full"] + ["part"] * 5


def test_staggered_parts_have_the_ages_of_synchronised_ones_but_not_their_ticks() -> None:
    ticks = runtime(eager(), reuse=ReuseConfig(every=3, synchronised=False))
    ids = []
    for seed in range(7):
        play(ticks, [seed])
        assert ticks._held is not None
        ids.append(dict(ticks._held.ids))
    assert ids[3] == {"camera0": 3, "camera1": 1, "text": 2, "state": 2}
    assert ids[4] == {"camera0": 3, "camera1": 4, "text": 2, "state": 2}
    assert ids[6] == {"camera0": 6, "camera1": 4, "text": 5, "state": 5}


@pytest.mark.parametrize(
    ("mode", "ids", "fits"),
    [
        ("full", {"camera0": 1, "text": 1, "state": 1}, True),
        ("full", {"camera0": 1, "text": 2, "state": 2}, False),
        ("vision_only", {"camera0": 1, "camera1": 1, "text": 3, "state": 3}, True),
        ("vision_only", {"camera0": 1, "camera1": 2, "text": 3, "state": 3}, False),
        ("vision_only", {"camera0": 1, "camera1": 1, "text": 2, "state": 3}, False),
        ("state_only", {"camera0": 3, "text": 3, "state": 1}, True),
        ("state_only", {"camera0": 2, "text": 3, "state": 1}, False),
        ("text_fixed", {"camera0": 3, "text": 1, "state": 3}, True),
        ("text_fixed", {"camera0": 3, "text": 1, "state": 2}, False),
    ],
)
def test_mixtures(mode: Any, ids: dict[str, int], fits: bool) -> None:
    config = ReuseConfig(mode=mode, every=5)
    if fits:
        check_mixture(ids, 3, config)
        return
    with pytest.raises(MixtureError, match=f"mode '{mode}' at tick 3 does not allow this mixture: camera0 of tick"):
        check_mixture(ids, 3, config)


def test_what_an_engine_lacks_is_an_error() -> None:
    for reuse in (
        ReuseConfig(mode="vision_only", every=2),
        ReuseConfig(mode="text_fixed"),
        ReuseConfig(every=2, synchronised=False),
    ):
        with pytest.raises(
            ValueError, match="recomputes part of a prefix, which the engine 'eager' can and engine 'turbo'"
        ):
            runtime(turbo(), reuse=reuse)
    with pytest.raises(ValueError, match=r"reuse\.layers is 9, the prefix has 3 layers"):
        runtime(eager(), reuse=ReuseConfig(mode="layer_wise", layers=9, every=2))
    with pytest.raises(ValueError, match="prompt_cache needs an engine that takes an embedded prompt"):
        runtime(turbo(), prompt_cache=True)


def test_a_prompt_is_embedded_once() -> None:
    engine = eager()
    count, ticks = Counting(engine), runtime(engine, prompt_cache=True)
    x, other = inputs(engine.config, 0), inputs(engine.config, 1)
    other.tokens.copy_(x.tokens)
    plain = engine.model.sample_actions(other, noise(engine.config), 2)
    ticks.sample(x, noise(engine.config), 6)
    actions, _ = ticks.sample(other, noise(engine.config), 6)
    assert count.take().count("embed_prompt") == 1
    assert torch.equal(actions, plain)


def test_captured_stages_say_what_they_still_hold() -> None:
    """`StageGraphs` write over their caches; the runtime's copy stays good."""
    from captured_stand_in import Captured

    engine = Captured()
    assert isinstance(engine.graphs, StageGraphs)
    assert isinstance(engine.graphs.functions, ReferenceFunctions)
    first, second = runtime(engine, reuse=ReuseConfig(every=3)), runtime(engine, reuse=ReuseConfig(every=3))
    alone = runtime(eager(), reuse=ReuseConfig(every=3))
    for seed in range(5):
        x, start = inputs(engine.config, seed), noise(engine.config, seed)
        assert torch.allclose(first.sample(x, start, 6)[0], alone.sample(x, start, 6)[0], atol=1e-5)
        second.sample(inputs(engine.config, 50 + seed), start, 6)


class WholeTicks(EagerEngine):
    """An engine that runs whole ticks, keeps caches in its own memory and offers nothing else."""

    accepts_uint8 = False

    def sample_actions(self, x: Any, start: torch.Tensor, steps: int) -> torch.Tensor:
        return self.denoise(self.prefill(self.encode_images(x.images, x.image_mask), *rest(x)), x.state, start, steps)

    def prefill(self, *arguments: Any) -> Any:
        cache = super().prefill(*arguments)
        if not hasattr(self, "memory"):
            self.memory = torch.empty_like(torch.stack(cache.keys))
        self.memory.copy_(torch.stack(cache.keys))
        return InItsMemory(self.memory.unbind(), cache.values, cache.lengths, cache.valid)

    def warm_up(self, *_: Any, **__: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class InItsMemory(PrefixCache):
    pass


def rest(x: Any) -> tuple[torch.Tensor, ...]:
    return x.image_mask, x.tokens, x.token_mask


def test_an_engine_that_offers_nothing_is_not_trusted_with_its_caches() -> None:
    """Its caches are copied where they are to be used again, and otherwise computed again."""
    model = eager().model
    engine = WholeTicks(model, "fp32")
    first, second = (runtime(engine, reuse=ReuseConfig(every=3)) for _ in range(2))
    alone = runtime(eager(), reuse=ReuseConfig(every=3))
    for seed in range(5):
        x, start = inputs(engine.config, seed), noise(engine.config, seed)
        ours, report = first.sample(x, start, 6)
        expected, told = alone.sample(x, start, 6)
        assert report.decision.kind == told.decision.kind
        assert torch.equal(ours, expected)
        second.sample(inputs(engine.config, 50 + seed), start, 6)
    plain = runtime(engine)
    assert play(plain, [1, 1]) == ["full", "full"]
