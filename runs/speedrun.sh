#!/bin/sh
# From an empty folder past the paper's table, 75.83% over 24 cells, by the shortest way: demonstrations, a short Stage I with its corpus, a short Stage II, both
# evaluations. The README's "Train it yourself" is the long way, to the weights that ship.
#
#   sh speedrun.sh                  two CPU cores: a bit more than an hour
#   sh speedrun.sh --budget gpu     one GPU, and all cores for the simulator: the same steps
#
# They run inside out/speedrun, so theirs is an `out` of their own; what is there already is not done again: a run that was stopped goes on when it is started again.
set -e
budget=${2:-cpu}
case "${1:---budget} $budget" in
    "--budget cpu" | "--budget gpu") ;;
    *) echo "error: '$*': it takes --budget cpu or --budget gpu, or nothing" >&2; exit 2 ;;
esac
root=$(cd "$(dirname "$0")" && pwd)
workers=$(nproc)
export PYTHONPATH="$root"
mkdir -p "$root/out/speedrun"
cd "$root/out/speedrun"
[ -f begun ] || date +%s > begun

said() {                            # said <name> <command>: run it once, and tell the minutes since the beginning
    [ -f "$1.done" ] && return
    name=$1; shift
    echo "+ $*"
    "$@"
    touch "$name.done"
    echo "$(( ($(date +%s) - $(cat begun)) / 60 )) minutes: $name" | tee -a times.txt
}
resume() { ls -d "$1"/state/[0-9]* > /dev/null 2>&1 && echo --resume; true; }

# the budget decides how it is computed, not what
case $budget in
    cpu) sft="env OMP_NUM_THREADS=$(((workers + 1) / 2)) torchrun --nproc_per_node 2"
         dtype=$(grep -qs avx512_bf16 /proc/cpuinfo && echo bfloat16 || echo float32) ;;
    gpu) sft=python; dtype=auto ;;
esac
said demonstrations python -m data.record --workers "$workers"
said corpus python -m data.corpus --workers "$workers"
said base $sft ../../train_sft.py --preset base --steps 1500 --dtype $dtype $(resume out/base)
said scenes $sft ../../train_sft.py --preset scenes --steps 1200 --dtype $dtype $(resume out/scenes)
said embodied $sft ../../train_sft.py --preset embodied --steps 2000 --dtype $dtype $(resume out/sft)
said policy python ../../train_policy.py --steps 6000 --dtype $dtype $(resume out/policy)
said physical python ../../eval.py physical --weights out/policy --episodes 50 --workers "$workers" --out physical.json
said digital python ../../eval.py digital --weights out/policy --base out/base --out digital.json
cat times.txt
