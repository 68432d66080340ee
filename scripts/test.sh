#!/usr/bin/env bash
# Sets up the environment, then runs lint, format check and the whole test suite. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_scripts.py -k batch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/env.sh
export PATH="$PWD/.venv/bin:$PATH"
export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$PWD/.venv/ffmpeg" # for torchcodec, see env.sh

ruff check .
ruff format --check .

# Two processes with one thread each: the tests' tensors are too small to benefit from more.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 2 "$@"
