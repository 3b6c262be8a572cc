"""The demo, with a simulation of a few lines: server, client, film, receipt and report are the real ones."""

import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openpi_client")
pytest.importorskip("imageio_ffmpeg")

ROOT = Path(__file__).parents[2]
LIMIT = 12


class Scene:
    """Holds its goal after `goal` steps."""

    def __init__(self, goal: int) -> None:
        self.task = SimpleNamespace(suite="libero_spatial", index=2, prompt="pick <it> up", step_limit=LIMIT)
        self.goal, self.steps = goal, 0
        self.state = np.zeros(8)

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def reset(self, initial_state: int, *, seed: int) -> None:
        self.steps = 0

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        frame = np.full((64, 64, 3), 10 * self.steps, np.uint8)
        return frame, frame

    def observe(self) -> dict[str, Any]:
        image, wrist = self.frames()
        named = {"observation/image": image, "observation/wrist_image": wrist, "observation/state": self.state}
        return {**named, "prompt": self.task.prompt}

    def step(self, action: np.ndarray) -> bool:
        self.steps += 1
        return self.steps == self.goal


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("turbopi_demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "OUT", tmp_path / "demo")
    monkeypatch.setattr(module, "load_task", lambda suite, index: Scene(0).task)
    return module


@pytest.mark.parametrize(("goal", "status", "word", "steps"), [(7, 0, "success", 7), (10_000, 1, "failure", LIMIT)])
def test_the_demo_says_what_happened(
    demo: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    goal: int,
    status: int,
    word: str,
    steps: int,
) -> None:
    monkeypatch.setattr(demo, "LiberoEnv", lambda task: Scene(goal))
    assert demo.main() == status
    printed = capsys.readouterr().out
    assert f"{word} after {steps} of at most {LIMIT} steps" in printed
    assert "round_trip" in printed
    results = json.loads((demo.OUT / "receipt.json").read_text())["results"]
    assert results["episode"]["success"] is (status == 0)
    assert np.array(results["actions"]).shape == (steps, 7)
    assert len(results["latency"]["round_trip"]["samples_ms"]) == -(-steps // demo.REPLAN)
    assert (demo.OUT / "episode.mp4").stat().st_size > 0
    assert (demo.OUT / "film_strip.png").stat().st_size > 0
    html = (demo.OUT / "report.html").read_text()
    HTMLParser().feed(html)
    assert f">{word}</span> after {steps} steps" in html
    assert 'src="episode.mp4"' in html
    assert "pick &lt;it&gt; up" in html
    assert html.count("<svg") == 4


def test_nothing_of_an_earlier_run_is_left(demo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    demo.OUT.mkdir()
    (demo.OUT / "report.html").touch()

    def no_simulator(task: Any) -> Scene:
        raise demo.RendererError("no off-screen OpenGL works here")

    monkeypatch.setattr(demo, "LiberoEnv", no_simulator)
    with pytest.raises(demo.RendererError):
        demo.main()
    assert not demo.OUT.exists()
