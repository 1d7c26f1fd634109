#!/usr/bin/env bash
# from a fresh clone to models that reason a little, from nothing: set-up, then
#   base     one mixed base model, pretrained             train_gpt.py
#   rl       GRPO on Countdown                            nanorl.py
#   ttrl     arithmetic questions without their answers   ttrl.py
#   student  a smaller model, pretrained                  train_gpt.py
#   opd      distilled from the model of rl               opd.py
#   table    before and after, and a picture              python -m bench speedrun
#
#   ./speedrun.sh                       all of it; a second call goes on where the first one stopped
#   ./speedrun.sh rl table              these stages only
#   RL_FLAGS="--steps 50" ./speedrun.sh rl       flags for one stage
#   ./speedrun.sh --install [dev]       the set-up only, with the named extras of pyproject.toml
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
if [ $# = 0 ]; then
    set -- base rl ttrl student opd table
fi
for name in "$@"; do
    case "$name" in
        base|rl|ttrl|student|opd|table) ;;
        *) echo "error: no stage '$name': one of base, rl, ttrl, student, opd, table" >&2; exit 2 ;;
    esac
done
install ""

# ---------------------------------------------------------------------------------------------------------------------
# the stages. On GPUs: all of them under torchrun, and larger models

gpus="$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')"
if [ "$gpus" -gt 0 ]; then
    launch=".venv/bin/python -m torch.distributed.run --standalone --nproc_per_node=$gpus --"     # without -- it takes our --n for one of its own
else
    launch=".venv/bin/python"
fi

stage() {      # stage NAME RUN SCRIPT [flags]: goes on where it stopped, does nothing twice
    local name="$1" run="$2" script="$3" resume="" more begin="$SECONDS" code=0
    shift 3
    if [ -d "runs/$run/ckpt" ] && grep -q "^$name done " runs/speedrun.txt 2>/dev/null; then
        echo "---- $name: runs/$run is there"
        return
    fi
    more="$(echo "$name" | tr a-z A-Z)_FLAGS"
    if [ -f "runs/$run/config.json" ]; then
        resume="--resume"
    fi
    echo "---- $name: $script $* ${!more:-} $resume"
    $launch "$script" "$@" ${!more:-} $resume || code=$?
    mkdir -p runs
    if [ "$code" != 0 ]; then
        echo "$name stopped $((SECONDS - begin))" >> runs/speedrun.txt
        echo "---- $name stopped ($code); the same command goes on with it" >&2
        exit "$code"
    fi
    echo "$name done $((SECONDS - begin))" >> runs/speedrun.txt
}

cpu_stage() {
    case "$1" in
        base)    stage base base train_gpt.py --device cpu ;;
        rl)      stage rl rl nanorl.py --device cpu ;;
        ttrl)    stage ttrl ttrl_majority ttrl.py --device cpu --passes 6 ;;
        student) stage student small train_gpt.py --preset small --device cpu ;;
        opd)     stage opd opd opd.py --init runs/small --teacher runs/rl --loss full --steps 200 --eval-every 40 --device cpu ;;
    esac
}

gpu_stage() {
    case "$1" in
        base)    stage base mixed100m train_gpt.py --preset mixed100m ;;
        rl)      stage rl rl nanorl.py ;;
        ttrl)    stage ttrl ttrl_majority ttrl.py --init runs/mixed100m --lr 1e-4 --row-tokens 16384 ;;
        student) stage student small train_gpt.py --preset mixed100m --name small --n-layer 4 --d-model 384 --n-head 6 --n-kv-head 2 \
                     --d-ff 1024 --steps 2000 ;;
        opd)     stage opd opd opd.py --init runs/small --teacher runs/rl --task countdown:4 --max-new 96 --lr 2e-4 --row-tokens 16384 ;;
    esac
}

for name in "$@"; do
    if [ "$name" = table ]; then
        .venv/bin/python -m bench speedrun ${TABLE_FLAGS:-}
    elif [ "$gpus" -gt 0 ]; then
        gpu_stage "$name"
    else
        cpu_stage "$name"
    fi
done
