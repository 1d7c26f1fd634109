#!/usr/bin/env bash
# from a fresh clone to a small model that solves some Countdown problems: set-up, then pretraining, then samples.
#   ./speedrun.sh                  a second call goes on where the first one stopped
#   ./speedrun.sh --steps 50       flags go to train_gpt.py
#   ./speedrun.sh --install [dev]  the set-up only, with the named extras of pyproject.toml
set -euo pipefail
cd "$(dirname "$0")"

# ---------------------------------------------------------------------------------------------------------------------
# set-up: .venv beside this file; PYTHON=python3.12 ./speedrun.sh names another interpreter for it

install() {
    local extras="$1" python="${PYTHON:-python3}" stamp=".venv/installed.${1:-plain}" pins=".venv/constraints.txt" want
    if [ ! -x .venv/bin/python ]; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "error: nanoRL needs Python 3.11 or newer, and '$python' is not: install one and name it, PYTHON=python3.12 $0" >&2
            exit 2
        fi
        # a CUDA torch that is already here fits this machine's driver: use it, do not fetch another
        local shared=""
        if "$python" -c 'import sys, torch; sys.exit(not torch.version.cuda)' 2>/dev/null; then
            if ! "$python" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))'; then
                echo "error: the torch of '$python' is older than 2.11: upgrade it, or name a Python without torch, PYTHON=... $0" >&2
                exit 2
            fi
            shared="--system-site-packages"
        fi
        echo "making .venv with $("$python" --version) $shared"
        "$python" -m venv $shared .venv || { rm -rf .venv; echo "error: '$python -m venv' failed (on Debian: apt install python3-venv)" >&2; exit 2; }
        if [ -n "$shared" ] && ! .venv/bin/python -c 'import torch' 2>/dev/null; then
            # python3 lives in an environment itself, which the new one does not look into
            "$python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
                > "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch_of_python3.pth"
        fi
    fi

    want="$(cat pyproject.toml constraints.txt | cksum)"
    # the dev set-up has all that the plain one has
    for have in "$stamp" .venv/installed.dev; do
        if { [ "$have" = "$stamp" ] || [ -z "$extras" ]; } && [ "$(cat "$have" 2>/dev/null)" = "$want" ]; then return; fi
    done

    cp constraints.txt "$pins"
    if grep -q 'include-system-site-packages = true' .venv/pyvenv.cfg; then
        grep -vE '^(torch|triton)==' constraints.txt > "$pins"
        .venv/bin/python -c 'import torch; print(f"torch=={torch.__version__}")' >> "$pins"
    fi
    echo "installing nanorl[$extras]: a few minutes the first time"
    .venv/bin/python -m pip install --disable-pip-version-check -c "$pins" -e ".${extras:+[$extras]}"
    echo "$want" > "$stamp"
    .venv/bin/python - <<'PY'
import importlib.util, torch
if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is None:
    print("a GPU is here: .venv/bin/pip install flash-attn --no-build-isolation may make attention faster (optional, a long build)")
PY
}

if [ "${1:-}" = "--install" ]; then
    install "${2:-}"
    exit
fi
install ""

# ---------------------------------------------------------------------------------------------------------------------
# the main job: pretrain the base into runs/base and print samples; a finished run only prints them again

resume=""
if [ -f runs/base/config.json ]; then
    resume="--resume"
fi
exec .venv/bin/python train_gpt.py $resume "$@"
