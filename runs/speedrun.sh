#!/bin/sh
# From an empty folder past the paper's table, 75.83% over 24 cells, by the shortest way:
# demonstrations, a short Stage I with its data, a short Stage II, both evaluations. runs/nano.sh is
# the long way, to the weights that ship.
#
#   sh runs/speedrun.sh                  two CPU cores: a bit more than an hour
#   sh runs/speedrun.sh --budget gpu     one GPU, and all cores for the simulator: the same steps
#
# It runs inside out/speedrun, so its `out` is one of its own. What is there already is not done
# again: a run that was stopped goes on when it is started again.
set -e
budget=${2:-cpu}
case "${1:---budget} $budget" in
    "--budget cpu" | "--budget gpu") ;;
    *) echo "error: '$*': it takes --budget cpu or --budget gpu, or nothing" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")/.." && pwd)
workers=$(nproc)
export PYTHONPATH="$root"
mkdir -p "$root/out/speedrun"
cd "$root/out/speedrun"
[ -f begun ] || date +%s > begun

once() { # once <name> <command>: run it if it was not done, and print the minutes since the beginning
    [ -f "$1.done" ] && return
    name=$1
    shift
    echo "+ $*"
    "$@"
    touch "$name.done"
    echo "$((($(date +%s) - $(cat begun)) / 60)) minutes: $name" | tee -a times.txt
}
resume() { # --resume if that folder holds a training that was stopped
    ls -d "$1"/state/[0-9]* > /dev/null 2>&1 && echo --resume
    true
}

# the budget decides how it is computed, not what
case $budget in
    cpu)
        train="env OMP_NUM_THREADS=$(((workers + 1) / 2)) torchrun --nproc_per_node 2"
        dtype=$(grep -qs avx512_bf16 /proc/cpuinfo && echo bfloat16 || echo float32) ;;
    gpu)
        train=python
        dtype=auto ;;
esac
stage1="$train -m nano.train --dtype $dtype"

once demonstrations python -m data.record --workers "$workers"
once scenes_data python -m nano.scenes --workers "$workers"
once instructions python -m nano.instructions
once look $stage1 --preset look --steps 900 $(resume out/look)
once base $stage1 --preset base --steps 600 $(resume out/base)
once scenes $stage1 --preset scenes --steps 1200 $(resume out/scenes)
once embodied $stage1 --preset embodied --steps 2000 $(resume out/sft)
once policy python "$root/train_policy.py" --backbone out/sft --steps 6000 --dtype $dtype $(resume out/policy)
once physical python "$root/eval.py" physical --weights out/policy --workers "$workers" --out physical.json
once digital python "$root/eval.py" digital --weights out/policy --base out/base --out digital.json
cat times.txt
