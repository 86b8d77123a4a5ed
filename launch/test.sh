#!/usr/bin/env bash
# Everything that must pass: style, types, tests.
#   bash launch/test.sh              what a change must pass before it is committed
#   bash launch/test.sh --all        slow, SLURM and browser tests too
#   bash launch/test.sh --coverage   (after --all) measure and print which lines ran; slower
#   bash launch/test.sh --gpu [OUT]   on a GPU, 8 minutes: right, fast, does it learn; --gpu --rehearse needs none
#   bash launch/test.sh tests/test_layers.py -k cycle      further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/set_up.sh
[ "${1:-}" = --gpu ] && { shift; set_up '[test]'; exec python tests/gpu "$@"; }
marks='not slow and not slurm and not browser'
[ "${1:-}" = --all ] && { marks=; shift; }
coverage=
[ "${1:-}" = --coverage ] && { coverage='coverage run -m'; shift; }

set_up '[test]'
ruff check .
ruff format --check --quiet .
mypy
OMP_NUM_THREADS=1 python -m $coverage pytest -n 2 --dist loadfile -m "$marks" "$@"
[ -z "$coverage" ] || { coverage combine --quiet; coverage report; }
