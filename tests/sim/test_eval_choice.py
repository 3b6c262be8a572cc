"""Which policy `turbo-pi eval` takes, and what LIBERO itself refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turbopi.cli.eval import NO_CHECKPOINT, _source
from turbopi.cli.options import PolicyOptions
from turbopi.sim.remote import RemoteSource
from turbopi.sim.sources import CheckpointSource


def test_a_checkpoint_or_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBO_PI_API_KEY", "sesame")
    assert _source(PolicyOptions(NO_CHECKPOINT), "a:1") == RemoteSource("a:1", "sesame")
    source = _source(PolicyOptions(Path("ck"), steps=3, seed=9, prompt="go"), None)
    assert isinstance(source, CheckpointSource)
    assert source.path == Path("ck")
    assert source.options["steps"] == 3
    assert source.options["default_prompt"] == "go"
    assert "seed" not in source.options
    for policy, remote in ((PolicyOptions(NO_CHECKPOINT), None), (PolicyOptions(Path("ck")), "a:1")):
        with pytest.raises(ValueError, match="either --checkpoint or --remote"):
            _source(policy, remote)
    assert _source(PolicyOptions(NO_CHECKPOINT, seed=3), "a:1") == RemoteSource("a:1", "sesame")
    with pytest.raises(ValueError, match="--steps, --invalid-tokens with --remote: the server has its own policy"):
        _source(PolicyOptions(NO_CHECKPOINT, steps=1, invalid_tokens="masked"), "a:1")


@pytest.mark.parametrize(("options", "steps"), [({}, 10), ({"runtime": "fast"}, 1), ({"steps": 3}, 3)])
def test_a_receipt_always_has_the_steps(options: dict[str, Any], steps: int) -> None:
    assert PolicyOptions(Path("ck"), **options).keywords()["steps"] == steps


def test_libero_refuses_what_it_does_not_have() -> None:
    pytest.importorskip("libero")
    from turbopi.sim.simulations import LiberoScenes

    facts = LiberoScenes().prepare("libero_spatial", (0, 9), 50)
    assert facts["renderer"] in ("egl", "osmesa")
    assert facts["mujoco"]
    for suite, task, trials, message in (
        ("libero_90x", 0, 1, "unknown LIBERO suite"),
        ("libero_spatial", 10, 1, "has no task 10"),
        ("libero_spatial", 0, 51, "50 initial states, fewer than 51"),
    ):
        with pytest.raises(ValueError, match=message):
            LiberoScenes().prepare(suite, (task,), trials)
