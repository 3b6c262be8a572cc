"""Which OpenGL draws the camera frames of a machine without a screen: EGL (a GPU's, or Mesa's) or OSMesa."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal, cast, get_args

GlName = Literal["egl", "osmesa"]

APT_COMMAND = (
    "apt-get install -y --no-install-recommends libosmesa6 libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglib2.0-0"
)

# Makes the context that robosuite will make, and lets the driver name itself.
_PROBE = {
    "egl": "from robosuite.renderers.context.egl_context import EGLGLContext as Context",
    "osmesa": "from robosuite.renderers.context.osmesa_context import OSMesaGLContext as Context",
}
_PROBE_BODY = """
context = Context(64, 64)
context.make_current()
from OpenGL import GL
print("renderer:", GL.glGetString(GL.GL_RENDERER).decode(), flush=True)
import os
os._exit(0)
"""
_PROBE_SECONDS = 120


class RendererError(OSError):
    """No off-screen OpenGL that works; says what was tried and what to install."""


def choose_gl() -> GlName:
    """Settle how this process and its children draw, by setting MUJOCO_GL and PYOPENGL_PLATFORM. Idempotent.

    Both are read once, when mujoco, robosuite and PyOpenGL are imported; call this before. What the user set is taken
    as it is. Otherwise EGL is tried, then OSMesa, each in a process of its own: a broken driver may crash, and PyOpenGL
    stays with the first platform that it meets.

    Returns:
        "egl" or "osmesa".

    Raises:
        RendererError: neither works, or the environment asks for something else or contradicts itself.
    """
    asked = os.environ.get("MUJOCO_GL", "").lower().strip()
    if asked:
        return _settle(_checked_name(asked))
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower().strip()
    candidates: tuple[GlName, ...] = (_checked_name(platform),) if platform else get_args(GlName)
    if "robosuite.utils.binding_utils" in sys.modules:
        raise RendererError(
            "robosuite was imported before OpenGL was chosen; import turbopi.sim first, or set MUJOCO_GL=egl or osmesa"
        )
    failures = []
    for name in candidates:
        failure = _probe(name)
        if failure is None:
            return _settle(name)
        failures.append(f"{name}: {failure}")
    raise RendererError(
        f"no off-screen OpenGL works here, so the simulator cannot draw its cameras ({'; '.join(failures)}); "
        f"install it: {APT_COMMAND}"
    )


def _checked_name(name: str) -> GlName:
    if name not in get_args(GlName):
        raise RendererError(
            f"the environment asks for OpenGL by {name!r} (MUJOCO_GL or PYOPENGL_PLATFORM); "
            "the simulator draws off-screen with egl or osmesa: set one of them, or unset both to have one chosen"
        )
    return cast(GlName, name)


def _settle(name: GlName) -> GlName:
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower().strip()
    if platform not in ("", name):
        raise RendererError(
            f"MUJOCO_GL={name} and PYOPENGL_PLATFORM={platform} contradict each other; set both alike, or neither"
        )
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = name
    return name


def _probe(name: GlName) -> str | None:
    """None when that OpenGL draws in a fresh process, else the last line of what it said."""
    environment = {**os.environ, "MUJOCO_GL": name, "PYOPENGL_PLATFORM": name}
    command = [sys.executable, "-c", _PROBE[name] + _PROBE_BODY]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"no answer in {_PROBE_SECONDS} s"
    if done.returncode == 0 and "renderer:" in done.stdout:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit status {done.returncode}"
