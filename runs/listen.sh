#!/bin/sh
# A policy that listens: in scenes with several commands it does the one that it is told. It starts
# from weights/nano, whose policy does not, and takes about seven hours on two CPU cores with AMX.
# docs/WEIGHTS.md says what has been made of it so far, docs/RESULTS.md how good that is; a training
# that was stopped goes on with --resume.
set -ex
cd "$(dirname "$0")/.."
workers=$(nproc)
two="torchrun --nproc_per_node 2"
tasks=PickCube,PushCube,PullCube,StackCube,PlaceSphere,LiftPegUpright
families=which_cube,which_way,which_stack,which_bin,peg_or_cube,mixed

# Stage I, blocks 1 to 4: what each patch shows, and what it is for in the command before it
python -m nano.scenes --scenes 12000 --workers "$workers"
python -m nano.commands --scenes 76800 --workers "$workers"
$two -m nano.train --preset look --backbone weights/nano --out out/listen \
    --mixture scenes:1,commands:5 --intent_layer 4 --steps 6000 --lr 3e-3 --batch_size 64 --dtype bfloat16

# Stage I, blocks 5 to 7: answers again, now about commands too
$two -m nano.train --backbone out/listen --out out/sft \
    --mixture scenes:1,command_questions:1,instructions:1 --intent_layer 4 --frozen_blocks 4 \
    --steps 9000 --dtype bfloat16

# Stage II: each layout of a family is played with two of its commands
python -m data.record --tasks "$families" --episodes 280 --workers "$workers"
python -m data.record --tasks "$tasks" --episodes 110 --workers "$workers"
$two -- train_policy.py --start weights/nano --backbone out/sft --tasks "$tasks,$families" \
    --intent_layer 4 --text_first --waypoint_loss --steps 14500 --eval_every 2000 --dtype bfloat16
python corrections.py --policy out/policy --tasks "$tasks,$families" --episodes 80 --workers "$workers"
$two -- train_policy.py --start weights/nano --backbone out/sft --tasks "$tasks,$families" \
    --intent_layer 4 --text_first --waypoint_loss --steps 20000 --eval_every 2000 --dtype bfloat16 \
    --resume

# what it can do
python eval.py told --weights out/policy --workers "$workers"
python eval.py plan --weights out/policy --workers "$workers"
python eval.py physical --weights out/policy --workers "$workers"
python eval.py digital --weights out/policy
