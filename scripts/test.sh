#!/usr/bin/env bash
# The environment, lint, format and the whole test suite. Arguments go to pytest:
#
#   bash scripts/test.sh
#   bash scripts/test.sh tests/test_scripts.py -k batch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/env.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .

# Two processes of one thread each: the tests' tensors are too small to gain from more threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n 2 "$@"
