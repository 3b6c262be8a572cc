#!/usr/bin/env bash
# Make .venv with the extras named on the command line, such as "sim,client". Needs Python 3.11 or 3.12 with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?usage: scripts/setup.sh EXTRAS}
python=${PYTHON:-python3}

fail() {
    echo "error: $*" >&2
    exit 1
}
has_torch() { "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8))' 2>/dev/null; }
pip_install() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
    fail "$python is not Python 3.11 or 3.12, which the simulator's MuJoCo needs; name one: make PYTHON=python3.12 …"

if [ ! -x .venv/bin/python ]; then
    # A GPU machine often has its own build of torch: use that one.
    if has_torch "$python"; then shared=--system-site-packages; else shared=; fi
    echo "making .venv${shared:+ around the torch of this machine}"
    "$python" -m venv $shared .venv || {
        rm -rf .venv
        fail "$python cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
    }
fi
if ! has_torch .venv/bin/python; then
    if command -v nvidia-smi >/dev/null; then torch='torch>=2.8'; else torch='torch==2.13.0'; fi
    echo "installing $torch"
    pip_install "$torch"
fi
echo "installing turbo-pi[$extras]"
pip_install -e ".[$extras]"

# The simulator draws off-screen, with libraries that only the system's packages bring.
draws() { .venv/bin/python -c 'from turbopi.sim.gl import choose_gl; choose_gl()' 2>/dev/null; }
case ",$extras," in *,sim,* | *,dev,*)
    echo "looking for OpenGL"
    if ! draws; then
        install=$(.venv/bin/python -c 'from turbopi.sim.gl import APT_COMMAND; print(APT_COMMAND)')
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "installing OpenGL: $install"
            $install >/dev/null 2>&1 || { apt-get -qq update && $install >/dev/null; } || true
        fi
        draws || echo "warning: nothing draws off-screen here, so the simulator will not; as root: $install" >&2
    fi
esac
