"""The runtime over captured graphs: fast ticks, two clients, guidance; nothing is captured after the warm-up."""

import pytest
import torch
from runtime_support import inputs, noise

from turbopi.audit.golden import hash_model
from turbopi.config import preset
from turbopi.engine import create_engine
from turbopi.engine.eager import EagerEngine
from turbopi.engine.turbo import TurboEngine
from turbopi.runtime import ReuseConfig, RtcConfig, Runtime, RuntimeConfig, SimilarityGate
from turbopi.runtime.guidance import guidance

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engines() -> tuple[TurboEngine, EagerEngine]:
    model = hash_model(preset("pi05-small"), 7, torch.float32, "cuda")
    turbo = create_engine("turbo", model, "fp32")
    assert isinstance(turbo, TurboEngine)
    return turbo, EagerEngine(model, "fp32")


@pytest.mark.parametrize(
    "reuse",
    [
        None,
        ReuseConfig(every=3),
        ReuseConfig(gate=SimilarityGate(0.2)),
        ReuseConfig(gate=SimilarityGate(0.9, "images")),
    ],
)
def test_two_clients_and_no_capture(engines: tuple[TurboEngine, EagerEngine], reuse: ReuseConfig | None) -> None:
    turbo, eager = engines
    config = RuntimeConfig(3, reuse=reuse)
    first, second, slow = (Runtime(engine, config) for engine in (turbo, turbo, eager))
    first.warm_up(2, torch.float32)
    prepared = turbo.describe()["graphs"]
    for seed in range(8):
        x, start = inputs(turbo.config, seed), noise(turbo.config, seed)
        ours, told = first.sample(x, start, 6)
        theirs, expected = slow.sample(x, start, 6)
        assert told.decision.kind == expected.decision.kind
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-3
        second.sample(inputs(turbo.config, 100 + seed), start, 6)
    assert turbo.describe()["graphs"] == prepared


def test_guidance_in_graphs_is_eagers(engines: tuple[TurboEngine, EagerEngine]) -> None:
    turbo, eager = engines
    config = RuntimeConfig(4, rtc=RtcConfig())
    ours, theirs = Runtime(turbo, config), Runtime(eager, config)
    ours.warm_up(2, torch.float32)
    prepared = turbo.describe()["graphs"]
    for seed in range(4):
        x, start = inputs(turbo.config, seed), noise(turbo.config, seed)
        left = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(seed))
        steering = guidance(left, tuple(start.shape), seed, 6, "LINEAR", 10.0)  # type: ignore[arg-type]
        a, b = ours.sample(x, start, 6, steering)[0], theirs.sample(x, start, 6, steering)[0]
        assert float((a - b).norm() / b.norm()) < 1e-3
    assert turbo.describe()["graphs"] == prepared
