#!/bin/sh
# From an empty folder to the table of 24 cells: demonstrations, corpus, Stage I in its three parts, Stage II, two rounds of corrections, evaluation.
#
#   sh speedrun.sh                  two CPU cores: about four hours
#   sh speedrun.sh --budget gpu     one GPU, and all cores for the simulator: the same steps
#
# Everything goes to out/speedrun; what is there already is not done again, so a run that was stopped goes on when it is started again.
set -e
budget=${2:-cpu}
case "${1:---budget} $budget" in
    "--budget cpu" | "--budget gpu") ;;
    *) echo "error: '$*': it takes --budget cpu or --budget gpu, or nothing" >&2; exit 2 ;;
esac
out=out/speedrun
workers=$(nproc)
mkdir -p $out
[ -f $out/begun ] || date +%s > $out/begun

said() {                            # said <name> <command>: run it once, and tell the minutes since the beginning
    [ -f "$out/$1.done" ] && return
    name=$1; shift
    echo "+ $*"
    "$@"
    touch "$out/$name.done"
    echo "$(( ($(date +%s) - $(cat $out/begun)) / 60 )) minutes: $name" | tee -a $out/times.txt
}
resume() { ls -d "$1"/state/[0-9]* > /dev/null 2>&1 && echo --resume; true; }

# the budget decides how it is computed, not what
case $budget in
    cpu) sft="torchrun --nproc_per_node 2 train_sft.py"; export OMP_NUM_THREADS=$(((workers + 1) / 2))
         dtype=$(grep -qs avx512_bf16 /proc/cpuinfo && echo bfloat16 || echo float32) ;;
    gpu) sft="python train_sft.py"; dtype=auto ;;
esac
said demonstrations python -m data.record --out $out/demos --workers "$workers"
said corpus python -m data.corpus --out $out/corpus --workers "$workers"
said general python -m data.general --out $out/general
said base $sft --dtype $dtype --preset base --data $out/corpus:1,$out/general/train.jsonl:1 --out $out/base $(resume $out/base)
said scenes $sft --dtype $dtype --preset scenes --data $out/corpus:3,$out/general/train.jsonl:1 --backbone $out/base --out $out/scenes $(resume $out/scenes)
said stage1 $sft --dtype $dtype --preset embodied --data $out/corpus:1,$out/general/train.jsonl:1 --backbone $out/scenes --out $out/sft $(resume $out/sft)
unset OMP_NUM_THREADS
policy="python train_policy.py --dtype $dtype --data $out/demos --backbone $out/sft --cache $out/intents --out $out/policy"
said stage2 $policy --steps 7000 $(resume $out/policy)
said table1 python eval.py physical --weights $out/policy --episodes 10 --workers "$workers" --out $out/physical-1.json
corrections="python -m data.record --policy $out/policy --tasks PickCube,StackCube,PlaceSphere,LiftPegUpright --out $out/demos --workers $workers"
said corrections1 $corrections --episodes 80
said stage2b $policy --resume --steps 12000
said corrections2 $corrections --episodes 40 --seed 10000
said stage2c $policy --resume --steps 16000
said digital python eval.py digital --weights $out/policy --base $out/base --corpus $out/corpus --general $out/general --out $out/digital.json
said table python eval.py physical --weights $out/policy --episodes 50 --workers "$workers" --out $out/physical.json
cat $out/times.txt
