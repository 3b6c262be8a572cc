import os
import subprocess
import sys
from pathlib import Path

import pytest

from turbopi.sim import gl

QUIET = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}


@pytest.fixture
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        monkeypatch.setenv(name, "")  # so that what choose_gl writes is undone
        monkeypatch.delenv(name)
    # As in a fresh process, whatever other tests imported.
    monkeypatch.delitem(sys.modules, "robosuite.utils.binding_utils", raising=False)
    return monkeypatch


def both_set() -> tuple[str | None, str | None]:
    return os.environ.get("MUJOCO_GL"), os.environ.get("PYOPENGL_PLATFORM")


def test_the_users_choice_is_taken_unprobed(nothing_set: pytest.MonkeyPatch) -> None:
    nothing_set.setattr(gl, "_probe", lambda name: pytest.fail("probed"))
    nothing_set.setenv("MUJOCO_GL", "OSMesa")
    assert gl.choose_gl() == "osmesa"
    assert both_set() == ("osmesa", "osmesa")


@pytest.mark.parametrize(("broken", "chosen"), [((), "egl"), (("egl",), "osmesa")])
def test_the_first_that_works(nothing_set: pytest.MonkeyPatch, broken: tuple[str, ...], chosen: str) -> None:
    nothing_set.setattr(gl, "_probe", lambda name: "no driver" if name in broken else None)
    assert gl.choose_gl() == chosen
    assert both_set() == (chosen, chosen)


def test_neither_works(nothing_set: pytest.MonkeyPatch) -> None:
    nothing_set.setattr(gl, "_probe", lambda name: f"{name} is broken")
    with pytest.raises(gl.RendererError, match=r"egl is broken.*osmesa is broken.*apt-get install .*libosmesa6"):
        gl.choose_gl()
    assert both_set() == (None, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"MUJOCO_GL": "glfw"}, "'glfw'.*egl or osmesa"),
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, "contradict"),
        ({"PYOPENGL_PLATFORM": "wayland"}, "'wayland'"),
    ],
)
def test_an_environment_that_cannot_be_honoured(
    nothing_set: pytest.MonkeyPatch, settings: dict[str, str], message: str
) -> None:
    for name, value in settings.items():
        nothing_set.setenv(name, value)
    with pytest.raises(gl.RendererError, match=message):
        gl.choose_gl()


def test_too_late(nothing_set: pytest.MonkeyPatch) -> None:
    nothing_set.setitem(sys.modules, "robosuite.utils.binding_utils", None)
    with pytest.raises(gl.RendererError, match="before OpenGL was chosen"):
        gl.choose_gl()


@pytest.mark.parametrize(
    ("probe", "failure"),
    [
        ("raise RuntimeError('no display')", "no display"),
        ("import os; os.abort()", "exit status -6"),
        ("print('renderer: x')", None),
    ],
)
def test_a_probe_may_fail_or_crash(monkeypatch: pytest.MonkeyPatch, probe: str, failure: str | None) -> None:
    monkeypatch.setitem(gl._PROBE, "egl", probe)
    monkeypatch.setattr(gl, "_PROBE_BODY", "")
    found = gl._probe("egl")
    assert found == failure or (failure is not None and found is not None and failure in found)


def test_a_probe_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gl._PROBE, "egl", "import time; time.sleep(60)")
    monkeypatch.setattr(gl, "_PROBE_SECONDS", 0.5)
    assert gl._probe("egl") == "no answer in 0.5 s"


def test_a_fresh_process_with_nothing_set() -> None:
    pytest.importorskip("libero")
    code = "from turbopi.sim.gl import choose_gl; print('chose', choose_gl())"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=QUIET, cwd=root, capture_output=True, text=True, check=True)
    assert "chose egl" in done.stdout or "chose osmesa" in done.stdout
