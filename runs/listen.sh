#!/bin/sh
# A policy that listens: in scenes with several commands it does the one that it is told. It starts
# from weights/nano, whose policy does not, and takes about three hours on two CPU cores with AMX. A
# training that was stopped goes on with --resume. docs/RESULTS.md says how good that is, and how good
# seven hours in many steps were, which docs/WEIGHTS.md lists.
set -ex
cd "$(dirname "$0")/.."
workers=$(nproc)
two="torchrun --nproc_per_node 2"
tasks=PickCube,PushCube,PullCube,StackCube,PlaceSphere,LiftPegUpright
families=which_cube,which_way,which_stack,which_bin,peg_or_cube,mixed

# Stage I: what each patch is for in a command, beside the questions. It is kept in weights/listen
python -m nano.instructions
python -m nano.scenes --scenes 8000 --workers "$workers"
python -m nano.commands --scenes 48000 --workers "$workers"
$two -m nano.train --backbone weights/nano --out out/listen \
    --mixture scenes:2,commands:6,command_questions:1,instructions:1 --intent_layer 4 \
    --frozen_blocks 0 --batch_size 48 --micro_batch 24 --lr 3e-3 --steps 3500 --eval_every 500 \
    --dtype bfloat16

# Stage II: each layout of a family is played with two of its commands
python -m data.record --tasks "$families" --episodes 120 --workers "$workers"
python -m data.record --tasks "$tasks" --episodes 50 --workers "$workers"
$two -- train_policy.py --start weights/nano --backbone out/listen --tasks "$tasks,$families" \
    --intent_layer 4 --text_first --waypoint_loss --steps 5500 --dtype bfloat16

# what it can do
python eval.py told --weights out/policy --workers "$workers"
python eval.py plan --weights out/policy --workers "$workers"
python eval.py physical --weights out/policy --workers "$workers"
python eval.py digital --weights out/policy
