#!/usr/bin/env bash
# Make .venv with the extras named on the command line, such as "serve,client". Needs Python 3.11 or newer with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?usage: scripts/setup.sh EXTRAS}
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11; name a newer one: make PYTHON=python3.12 …" >&2
    exit 1
}
has_torch() { "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
    # A GPU machine often has its own build of torch: use that one.
    if has_torch "$python"; then shared=--system-site-packages; else shared=; fi
    echo "making .venv${shared:+ around the torch of this machine}"
    "$python" -m venv $shared .venv
fi
if ! has_torch .venv/bin/python; then
    if command -v nvidia-smi >/dev/null; then torch='torch>=2.8'; else torch='torch==2.13.0'; fi
    echo "installing $torch"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$torch"
fi
echo "installing turbo-pi[$extras]"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"

# The simulator draws off-screen through EGL or OSMesa, and its OpenCV wants libGL: only system packages bring them.
case ",$extras," in *,sim,* | *,dev,*)
    libraries=$(ldconfig -p)
    if ! { grep -q 'libOSMesa\|libEGL' <<<"$libraries" && grep -q 'libGL\.so\.1' <<<"$libraries"; }; then
        packages="libosmesa6 libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libglib2.0-0"
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            echo "installing $packages"
            apt-get install -qq -y --no-install-recommends $packages >/dev/null ||
                { apt-get update -qq && apt-get install -qq -y --no-install-recommends $packages >/dev/null; }
        else
            echo "note: the simulator needs OpenGL: apt-get install $packages" >&2
        fi
    fi
esac
