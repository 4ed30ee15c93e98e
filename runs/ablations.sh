#!/bin/sh
# What each part of the method is worth: policies trained with one thing changed, the same number of
# steps, the same evaluation.
#
#   sh runs/ablations.sh                    every row, about six minutes each on two CPU cores
#   sh runs/ablations.sh full no_intent     some of them
#   python -m dev.ablations --runs out/ablations        the table
#
# STEPS, EPISODES, DTYPE: for another length. What is done is not done again; a row that was stopped
# goes on. Wants demonstrations (and corrections) in out/demos, as runs/nano.sh makes them.
set -e
cd "$(dirname "$0")/.."
rows=$*
steps=${STEPS:-2000}
episodes=${EPISODES:-20}
out=out/ablations

model() { # model <row> <number> <steps> <robots> <tasks> <flags of train_policy.py>
    row=$1; number=$2; length=$3; robots=$4; tasks=$5
    shift 5
    case " ${rows:-$row} " in *" $row "*) ;; *) return 0 ;; esac
    folder=$out/$row/$number
    [ -f "$folder.json" ] && return 0
    resume=
    if ls "$folder"/state/[0-9]* > /dev/null 2>&1; then resume=--resume; fi
    if [ ! -f "$folder.trained" ]; then
        mkdir -p "$out/$row"
        python train_policy.py --out "$folder" --steps "$length" --eval_every "$length" \
            --robots "$robots" --tasks "$tasks" --dtype "${DTYPE:-auto}" $resume "$@"
        touch "$folder.trained"
    fi
    python eval.py physical --weights "$folder" --episodes "$episodes" \
        --robots "$robots" --tasks "$tasks" --out "$folder.json"
}

# what is changed
model full 0 "$steps" all all --demonstrations 100
model no_stage_1 0 "$steps" all all --demonstrations 100 --backbone weights/base
model no_intent 0 "$steps" all all --demonstrations 100 --no-use_intent
model no_future 0 "$steps" all all --demonstrations 100 --no-future_loss
model last_block 0 "$steps" all all --demonstrations 100 --intent_layer 7

# one model for each robot, or each robot and task: they share the steps
number=0
for robot in panda xarm6 xarm7 widowx; do
    model per_robot $number $((steps / 4)) $robot all --demonstrations 100
    number=$((number + 1))
done
number=0
for robot in panda xarm6 xarm7 widowx; do
    for task in PickCube PushCube PullCube StackCube PlaceSphere LiftPegUpright; do
        model per_cell $number $(((steps + 12) / 24)) $robot $task --demonstrations 100
        number=$((number + 1))
    done
done

# fewer demonstrations, and all there are
model 50_demonstrations 0 "$steps" all all --demonstrations 50
model 25_demonstrations 0 "$steps" all all --demonstrations 25
model corrections 0 "$steps" all all

# a robot that comes later
three=panda,xarm6,xarm7
model three_robots 0 "$steps" $three all --demonstrations 100
for n in 10 25; do
    model adapted_$n 0 $((steps * 3 / 10)) widowx all --demonstrations $n \
        --start $out/three_robots/0
    model alone_$n 0 $((steps * 3 / 10)) widowx all --demonstrations $n
done
