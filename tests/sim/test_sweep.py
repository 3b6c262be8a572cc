"""Grids of runtimes with the fake simulation; their page; and policies that play their own chunks."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import eval_fakes
import numpy as np
import pytest

from turbopi.checkpoint import init_checkpoint
from turbopi.cli.main import main
from turbopi.cli.options import PolicyOptions
from turbopi.cli.sweep import wherever
from turbopi.report.pareto import Point, pareto_front, write_sweep_report
from turbopi.sim import simulations, sources
from turbopi.sim.episodes_file import read_records
from turbopi.sim.rollout import EpisodeSpec, jerk, run_episode
from turbopi.sim.sweep import read_grid, run_on_ray


def grid_file(path: Path, values: Any) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_a_grid_is_every_combination_over_its_base(tmp_path: Path) -> None:
    values = {
        "base": {"reuse": {"max_age": 9}},
        "grid": {"steps": [1, 2], "reuse.every": [2, 3]},
        "settings": {"odd": {"steps": 7, "reuse": {"every": 5}}},
    }
    settings = read_grid(grid_file(tmp_path / "g.json", values))
    assert list(settings) == [*(f"steps={s},reuse.every={n}" for s in (1, 2) for n in (2, 3)), "odd"]
    assert settings["steps=2,reuse.every=3"] == {"reuse": {"max_age": 9, "every": 3}, "steps": 2}
    assert settings["odd"] == {"reuse": {"max_age": 9, "every": 5}, "steps": 7}


def test_a_field_within_a_map_of_the_grid_is_each_combinations_own(tmp_path: Path) -> None:
    values = {"grid": {"reuse": [{"max_age": 9}], "reuse.every": [2, 3]}}
    settings = read_grid(grid_file(tmp_path / "g.json", values))
    assert [setting["reuse"] for setting in settings.values()] == [{"max_age": 9, "every": n} for n in (2, 3)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "names no settings"),
        ([1], "is no grid: expected maps named base, grid, settings"),
        ({"girds": {}}, "is no grid"),
        ({"grid": {"steps": 3}}, "grid.steps is 3, expected a list"),
        ({"settings": {"../x": {}}}, "cannot be one"),
        ({"settings": {"x": 3}}, "a setting is 3, expected a map"),
        ({"grid": {"steps": [1, "1"]}}, "two settings are called 'steps=1'"),
        ({"grid": {"steps": [1]}, "settings": {"steps=1": {"steps": 9}}}, "two settings are called 'steps=1'"),
        ({"grid": {"reuse": [None], "reuse.every": [1]}}, "grid.reuse.every lies within a field .* None, no map"),
        ({"grid": {"reuse.every": [1], "reuse": [{"max_age": 3}]}}, "grid.reuse is set by another field"),
    ],
)
def test_files_that_are_no_grid(tmp_path: Path, values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_grid(grid_file(tmp_path / "g.json", values))


def test_no_grid(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no grid at"):
        read_grid(tmp_path / "g.json")
    (tmp_path / "g.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_grid(tmp_path / "g.json")


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([*map(str, arguments)])
    return int(exit_.value.code or 0)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "LiberoScenes", lambda camera_px, prompts: eval_fakes.FakeScenes())
    monkeypatch.setattr(
        sources,
        "CheckpointSource",
        lambda path, options: (
            eval_fakes.FakeSource(strength=options["runtime"].steps / 2)
            if options.get("runtime")
            else eval_fakes.FakeSource()
        ),
    )


def test_a_sweep_and_its_report(tmp_path: Path, fakes: None, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grid_file(tmp_path / "g.json", {"grid": {"steps": [1, 4]}})
    options = ("--checkpoint", "ck", "--tasks", 1, "--trials", 1, "--workers", 2, "--at-once", 2, "--minimum", 1)
    assert run("sweep", "--grid", grid, "--out", tmp_path / "s", *options) == 0
    assert "2/2 steps=" in capsys.readouterr().out
    content = json.loads((tmp_path / "s" / "sweep.json").read_text())
    rates = {row["name"]: row["total"]["rate"] for row in content["rows"]}
    assert rates == {"steps=1": 0.0, "steps=4": 1.0}
    assert len(read_records(tmp_path / "s" / "steps=4")) == 1
    assert run("sweep", "--grid", grid, "--out", tmp_path / "s", *options) == 0  # continues: nothing is left to play
    assert len(read_records(tmp_path / "s" / "steps=4")) == 1
    assert run("report", "--sweep", tmp_path / "s") == 0
    page = (tmp_path / "s" / "report.html").read_text()
    assert "Pareto front" in page
    assert "steps=4" in page


def test_each_setting_is_a_policy_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the checkpoint, the worker processes and the command line as they are."""
    monkeypatch.setattr(simulations, "LiberoScenes", lambda camera_px, prompts: eval_fakes.FakeScenes())
    path = init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="libero")
    grid = grid_file(tmp_path / "g.json", {"grid": {"steps": [2]}, "settings": {"old": {"reuse": {"every": 2}}}})
    options = ("--checkpoint", path, "--device", "cpu", "--tasks", 1, "--trials", 1, "--workers", 1)
    assert run("sweep", "--grid", grid, "--out", tmp_path / "s", *options) == 0
    few, old = (json.loads((tmp_path / "s" / name / "config.json").read_text()) for name in ("steps=2", "old"))
    assert few["policy"]["runtime"] == {"steps": 2, "seed": 0}
    assert old["policy"]["runtime"] == {"steps": 10, "seed": 0, "reuse": {"every": 2}}


def test_what_a_sweep_refuses(tmp_path: Path, fakes: None, capsys: pytest.CaptureFixture[str]) -> None:
    grid = grid_file(tmp_path / "g.json", {"grid": {"steps": [0]}})
    common = ("sweep", "--out", tmp_path / "s", "--checkpoint", "ck", "--grid")
    assert run(*common, grid) == 1
    assert "RuntimeConfig.steps must be" in capsys.readouterr().err
    assert run(*common, grid, "--runtime", "fast") == 1
    assert "the grid has the runtimes" in capsys.readouterr().err
    assert run(*common, grid, "--steps", 3) == 1
    assert "the grid has the steps" in capsys.readouterr().err
    assert run(*common, grid_file(tmp_path / "h.json", {"grid": {"steps": [1]}}), "--at-once", 0) == 1
    assert "at least one run" in capsys.readouterr().err
    assert run(*common, grid_file(tmp_path / "s.json", {"grid": {"seed": [0, 1]}})) == 1
    assert "seed=1: an episode's noise comes from --seed alone" in capsys.readouterr().err


def test_ray_is_asked_for_by_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"install turbo-pi with its extra \[ray\]"):
        run_on_ray({}, None, lambda name, summary: None, gpu=False)


def test_paths_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = PolicyOptions(Path("ck"), engine="vision=onnx:e,prefill=turbo,denoise=turbo>onnx:/e", plan=Path("p.json"))
    found = wherever(given)
    assert (found.checkpoint, found.plan, found.calibration) == (tmp_path / "ck", tmp_path / "p.json", None)
    assert found.engine == f"vision=onnx:{tmp_path}/e,prefill=turbo,denoise=turbo>onnx:/e"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Ray of this machine, whose workers stand in the directory of before the test and find the fakes."""
    monkeypatch.setenv("PYTHONPATH", str(Path(eval_fakes.__file__).parent))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    terminated = signal.getsignal(signal.SIGTERM)  # which Ray takes for itself
    ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    signal.signal(signal.SIGTERM, terminated)


def test_on_ray_every_run_is_a_task(
    cluster: None, tmp_path: Path, fakes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    grid = grid_file(tmp_path / "g.json", {"grid": {"steps": [1, 4]}})
    options = ("--checkpoint", "ck", "--tasks", 1, "--trials", 1, "--workers", 1, "--ray")
    assert run("sweep", "--grid", grid, "--out", "s", *options) == 0
    content = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert {row["name"]: row["total"]["rate"] for row in content["rows"]} == {"steps=1": 0.0, "steps=4": 1.0}
    config = tmp_path / "s" / "steps=4" / "config.json"
    assert json.loads(config.read_text())["config"]["source"]["gpus"] in ("0", "1")
    assert len(read_records(config.parent)) == 1
    config.write_text("{")
    assert run("sweep", "--grid", grid, "--out", "s", *options) == 1
    assert capsys.readouterr().err.startswith(f"error: {config} is not JSON")


def test_the_front_is_what_nothing_beats() -> None:
    def point(name: str, ms: float, rate: float) -> Point:
        return Point(name, ms, rate, (rate, rate))

    points = [point("a", 10, 0.9), point("b", 5, 0.8), point("c", 6, 0.7), point("d", 20, 0.9), point("e", 5, 0.6)]
    assert [p.name for p in pareto_front(points)] == ["b", "a"]


def test_no_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="give the --out directory of a `turbo-pi sweep`"):
        write_sweep_report(tmp_path)
    (tmp_path / "sweep.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no setting with an outcome yet"):
        write_sweep_report(tmp_path)


def test_jerk_is_the_second_difference_of_motions() -> None:
    steady = np.ones((9, 7))
    assert jerk(steady) == 0.0
    shaking = steady * (-1.0) ** np.arange(9)[:, None]
    assert jerk(shaking) == pytest.approx(np.sqrt(6 * 16))
    gripper = np.zeros((9, 7))
    gripper[::2, 6] = 1
    assert jerk(gripper) == 0.0
    assert jerk(steady[:2]) is None


def test_a_policy_with_chunking_plays_its_own_chunks(tmp_path: Path) -> None:
    """A checkpoint's runtime decides when to look; the episode's record says what it did."""
    from turbopi import RuntimeConfig
    from turbopi.runtime import ChunkingConfig, RtcConfig

    path = init_checkpoint(tmp_path / "ck", "pi05-tiny", weights="hash", robot="libero")
    runtime = RuntimeConfig(1, chunking=ChunkingConfig(replan=3, delay=1), rtc=RtcConfig())
    source = sources.CheckpointSource(path, {"device": "cpu", "runtime": runtime})
    assert source.describe()["runtime"] == runtime.to_dict()
    env = eval_fakes.FakeEnv("libero_spatial", 0, 0.0)
    result = run_episode(env, source.open().episode(3), EpisodeSpec("libero_spatial", 0, 0, 7), replan=5)  # type: ignore[arg-type]
    assert result.steps == 8
    assert result.inferences == 3
    assert result.jerk is not None
    assert result.runtime is not None
    assert result.runtime["latency_ticks"] == 1
    assert result.runtime["held"] == 0


def test_ctrl_c_ends_a_sweep_at_once(
    tmp_path: Path, fakes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    ended: list[int] = []
    monkeypatch.setattr("turbopi.sim.sweep.evaluate", interrupted)
    monkeypatch.setattr("turbopi.cli.sweep.os._exit", ended.append)
    grid = grid_file(tmp_path / "g.json", {"grid": {"steps": [1]}})
    run("sweep", "--grid", grid, "--out", tmp_path / "s", "--checkpoint", "ck")
    assert ended == [130]
    assert "the same command continues" in capsys.readouterr().out


def test_an_error_of_a_run_ends_the_sweep(
    tmp_path: Path, fakes: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("the checkpoint is for robot 'aloha'")

    monkeypatch.setattr("turbopi.sim.sweep.evaluate", refuses)
    grid = grid_file(tmp_path / "g.json", {"grid": {"steps": [1, 2]}})
    assert run("sweep", "--grid", grid, "--out", tmp_path / "s", "--checkpoint", "ck") == 1
    assert "is for robot 'aloha'" in capsys.readouterr().err
