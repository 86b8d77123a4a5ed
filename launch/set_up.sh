#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh from the top of the checkout: makes .venv there, installs, and activates it. What
# was done before is not done again. A torch that python can import already is kept; else the tested version is installed.
#   WHEELS=wheels bash launch/quickstart.sh         everything from that folder (launch/wheels.sh made it), no network
#   PYTHON=python3.12 bash launch/quickstart.sh     another interpreter than python3

stop() { echo "error: $*" >&2; exit 2; }

check_machine() {  # check_machine PYTHON: what .venv cannot bring
    command -v "$1" >/dev/null || stop "$1 is not here; install Python 3.10 or newer (Debian: apt-get install python3)"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        stop "$1 is $("$1" -V 2>&1): 3.10 or newer is needed; name another one with PYTHON=python3.12"
    [ -n "${WHEELS:-}" ] || "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        stop "$1 has no venv; install it (Debian: apt-get install python3-venv)"
}

make_environment() {  # make_environment PYTHON: .venv, which sees the torch that PYTHON sees, in a virtual environment too
    local torch site
    "$1" -m venv --clear .venv 2>/dev/null || "$1" -m venv --clear --without-pip .venv  # then the pip beside torch is used
    if torch=$("$1" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' 2>/dev/null); then
        site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
        echo "$torch" > "$site/outer_torch.pth"
        echo "keeping the torch in $torch"
    fi
}

install_offline() {
    python -c 'import torch, numpy, cv2' || stop "without a network torch, NumPy and OpenCV must be here already"
    python -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl
    python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable .
}

install() {  # install EXTRA: torch first and pinned, so that pip draws no other one in with the rest
    local torch
    [ -z "${WHEELS:-}" ] || { install_offline; return; }
    python -c 'import torch' 2>/dev/null || python -m pip install "$(grep '^torch==' launch/constraints.txt)"
    torch=$(python -c 'import torch; print(torch.__version__)')
    { echo "torch==$torch"; grep -v '^torch==' launch/constraints.txt; } > .venv/constraints.txt
    python -m pip install --constraint .venv/constraints.txt --editable ".$1"
}

set_up() {  # set_up [EXTRA], for example: set_up '[test]'
    local extra=${1:-} wanted stamp
    .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        { check_machine "${PYTHON:-python3}"; make_environment "${PYTHON:-python3}"; }
    . .venv/bin/activate
    wanted=$(cat setup.py launch/constraints.txt | cksum)
    stamp=.venv/installed$extra
    if ! grep -qsxF "$wanted" .venv/installed'[test]' "$stamp"; then
        echo "installing into .venv (DeepSpeed is packed from its source: a minute or two) …"
        install "$extra"
        echo "$wanted" > "$stamp"
    fi
}
