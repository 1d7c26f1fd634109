#!/usr/bin/env bash
# from a fresh clone: set-up, lint, all tests. Arguments go to pytest: ./test.sh tests/test_run.py -k signal
set -euo pipefail
cd "$(dirname "$0")"

./speedrun.sh --install dev
.venv/bin/python -m ruff check .
if [ $# = 0 ]; then      # all of them: in two processes, a file at a time, in the order that tests/conftest.py gives
    set -- -n 2 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest -q --durations=10 "$@"
