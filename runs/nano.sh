#!/bin/sh
# The recipe of weights/nano and weights/base, from nothing, on two CPU cores with AVX-512 BF16.
# Each line is one stage; a training that was stopped goes on with --resume. docs/ says how long each
# took and how good it was. The weights that ship came by these commands in earlier spellings, and
# from further corrections of LiftPegUpright whose recorder was not kept: expect the same table
# within its intervals, not the same bytes.
set -ex
cd "$(dirname "$0")/.."
workers=$(nproc)
two="torchrun --nproc_per_node 2"

# Stage I: questions about scenes, instructions, then four stages; `base` is kept in weights/base
python -m nano.scenes --workers "$workers"
python -m nano.instructions
$two -m nano.train --dtype bfloat16

# Stage II: 100 demonstrations of each robot and task, then three rounds of corrections
python -m data.record --workers "$workers"
python train_policy.py --backbone out/sft --dtype bfloat16
python corrections.py --policy out/policy --episodes 80 --tasks PickCube,StackCube,PlaceSphere
python train_policy.py --backbone out/sft --dtype bfloat16 --resume --steps 12000
python corrections.py --policy out/policy --episodes 60 --tasks LiftPegUpright --seed 10000
python corrections.py --policy out/policy --episodes 20 --tasks PickCube,StackCube,PlaceSphere --seed 10000
python train_policy.py --backbone out/sft --dtype bfloat16 --resume --steps 16000
python corrections.py --policy out/policy --episodes 60 --tasks LiftPegUpright --seed 20000
python corrections.py --policy out/policy --episodes 20 --tasks PickCube,StackCube,PlaceSphere --seed 20000
python train_policy.py --backbone out/sft --dtype bfloat16 --resume --steps 19000

# what they can do
python eval.py physical --weights out/policy --workers "$workers"
python eval.py told --weights out/policy --workers "$workers"
python eval.py perturbations --weights out/policy --episodes 20 --workers "$workers"
python eval.py digital --weights out/policy --base out/base
