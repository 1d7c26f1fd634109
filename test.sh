#!/usr/bin/env bash
# from a fresh clone: set-up, lint, all tests. Arguments go to pytest: ./test.sh tests/test_run.py -k signal
set -euo pipefail
cd "$(dirname "$0")"

./speedrun.sh --install dev
.venv/bin/python -m ruff check .
exec .venv/bin/python -m pytest -q --durations=10 "$@"
