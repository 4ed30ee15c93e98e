#!/bin/sh
# From an empty folder to the table of 24 cells: demonstrations, Stage I with its corpus, Stage II, two rounds of corrections, evaluation: the README's commands.
#
#   sh speedrun.sh                  two CPU cores: about four hours
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
policy="python $root/train_policy.py --dtype $dtype"
corrections="python -m data.record --policy out/policy --tasks PickCube,StackCube,PlaceSphere,LiftPegUpright --workers $workers"
said demonstrations python -m data.record --workers "$workers"
said corpus python -m data.corpus --workers "$workers"
said stage1 $sft "$root/train_sft.py" --dtype $dtype $(resume out/sft)
said stage2 $policy --steps 7000 $(resume out/policy)
said table1 python "$root/eval.py" physical --weights out/policy --episodes 10 --workers "$workers" --out physical-1.json
said corrections1 $corrections --episodes 80
said stage2b $policy --resume --steps 12000
said corrections2 $corrections --episodes 40 --seed 10000
said stage2c $policy --resume --steps 16000
said digital python "$root/eval.py" digital --weights out/policy --base out/base --out digital.json
said table python "$root/eval.py" physical --weights out/policy --episodes 50 --workers "$workers" --out physical.json
cat times.txt
