#!/usr/bin/env bash
# metaworld 3.1.1 (with mujoco 3.3.0, as it asks for).
# Expected: render() right after reset() shows the episode that has just begun.
# Seen:     reset() moves things in the model and sets joints, and does not compute where bodies are
#           from them. Until the first step pictures show things where they were: in window-close
#           the window stands 20 cm from its place. With seed 1, ten of 50 tasks draw a thing elsewhere
#           and 19 more something else, such as a mark. Who looks before acting, as a policy does,
#           sees another scene than the one that it acts in; who calls mj_forward first does not.
#           reach is drawn right.
# Source:   this run; reset_model of the tasks in metaworld/envs, which end without mj_forward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q metaworld==3.1.1 mujoco==3.3.0 packaging
cd "$folder"
MUJOCO_GL="${MUJOCO_GL:-egl}" venv/bin/python -W ignore - <<'PYTHON'
import gymnasium
import metaworld  # noqa: F401, names its environments to gymnasium
import mujoco
import numpy as np


def first_picture(name):
    """(m that bodies are off, pixels that are) in the picture after a reset."""
    env = gymnasium.make(
        "Meta-World/MT1", env_name=name, seed=1, render_mode="rgb_array", camera_name="corner2"
    )
    env.reset()
    inner = env.unwrapped
    picture = env.render()
    places = inner.data.xpos.copy()
    mujoco.mj_forward(inner.model, inner.data)
    off = np.abs(inner.data.xpos - places).max()
    pixels = (env.render() != picture).any(-1).sum()
    env.close()
    return float(off), int(pixels)


off, pixels = first_picture("window-close-v3")
print(f"window-close: bodies up to {100 * off:.0f} cm elsewhere, {pixels} pixels differ")
assert abs(off - 0.2) < 0.01 and pixels > 1000, "drawn where it is now: this finding is out of date"
off, pixels = first_picture("reach-v3")
print(f"reach: {100 * off:.0f} cm, {pixels} pixels")
assert off < 1e-9 and pixels == 0
PYTHON
