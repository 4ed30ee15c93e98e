"""The environment: determinism, clipping, fingers, and machines without a GL or a whole mujoco."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from cli import UserError
from data.env import CONTROL_HZ, TabletopEnv
from data.robots import ROBOTS, SQUEEZE


def settle(env, steps=6, finger=None):
    """Hold still for some steps; returns the last info."""
    finger = env.robot.travel if finger is None else finger
    hold = np.append(env.data.ctrl[: env.robot.dof], finger)
    for _ in range(steps):
        *_, info = env.step(hold)
    return info


@pytest.mark.parametrize("robot", ROBOTS)
def test_fingers_close_on_nothing_and_open_again(robot):
    env = TabletopEnv(robot, "PushCube", render=False)
    env.reset(0)
    dof = env.robot.dof
    travel = env.robot.travel
    for _ in range(2):
        for target, rest in ((SQUEEZE, 0.0), (travel, travel)):
            settle(env, 12, target)
            assert np.abs(env.data.qpos[dof : dof + 2] - rest).max() < 1.5e-3
            assert np.abs(env.data.qvel[dof : dof + 2]).max() < 0.01


def four_steps():
    env = TabletopEnv("xarm7", "PickCube")
    env.reset(5)
    for i in range(4):
        observation, *_ = env.step(np.append(env.robot.home + 0.02 * i, 0.02))
    env.close()
    return observation


def test_env_is_deterministic_and_renders_what_it_says():
    a = four_steps()
    b = four_steps()
    assert np.array_equal(a["state"], b["state"]) and a["instruction"] == b["instruction"]
    for view in ("front", "wrist"):
        assert np.array_equal(a["images"][view], b["images"][view])
        assert a["images"][view].shape == (128, 128, 3) and a["images"][view].std() > 5
    env = TabletopEnv("xarm7", "PickCube", render=False)
    assert not np.array_equal(env.reset(6)[0]["state"], env.reset(7)[0]["state"])
    assert a["state"].shape == (env.robot.state_dim,)


def test_actions_are_clipped_counted_and_checked():
    env = TabletopEnv("widowx", "PickCube", render=False)
    env.reset(0)
    *_, info = env.step(np.append(np.full(6, 9.0), 1.0))
    assert info["clipped"] == {"limits": 1, "speed": 1}
    moved = env.data.ctrl[:6] - env.robot.home
    assert (moved <= env.robot.velocity_limit / CONTROL_HZ + 0.1).all()
    assert env.data.ctrl[6] == env.robot.travel
    for bad in (np.zeros(3), np.full(7, np.nan)):
        with pytest.raises(ValueError, match="7 finite numbers"):
            env.step(bad)


@pytest.mark.parametrize("names", [("pandas",), ("panda", "PikCube")])
def test_unknown_names_list_the_choices(names):
    with pytest.raises(UserError, match=r"choose from.*did you mean"):
        TabletopEnv(*names)


# ---- machines as they are

NO_GL = """
import ctypes
load = ctypes.CDLL.__init__
def refuse(self, name, *more, **options):
    if any(part in str(name) for part in ("GL", "OSMesa", "glfw")):
        raise OSError(f"{name}: cannot open shared object file")
    load(self, name, *more, **options)
ctypes.CDLL.__init__ = refuse
"""
BROKEN = "raise ImportError('core bindings are missing')"
STEP = "import numpy as np; from data.env import TabletopEnv; e = TabletopEnv(render=False); "
STEP += "e.reset(0); e.step(np.zeros(7)); print('stepped'); "
DRAW = "import cli; cli.run(lambda: e.draw('front'))"


def python(code, folder, module, text, gl):
    """Run `code` with `module` replaced by `text`: sitecustomize runs before anything else."""
    path = folder / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    }
    environment |= {"PYTHONPATH": f"{folder}:{ROOT}"} | ({"MUJOCO_GL": gl} if gl else {})
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("gl", ["", "egl", "osmesa", "glfw", "nonsense"])
def test_without_a_gl_only_drawing_fails(gl, tmp_path):
    done = python(STEP + DRAW, tmp_path, "sitecustomize.py", NO_GL, gl)
    assert done.stdout == "stepped\n"
    assert done.returncode == 2 and "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: cannot draw with MUJOCO_GL=") and "apt-get install" in line


def test_the_choice_of_gl_is_left_as_it_was(tmp_path):
    code = "import os; import data.env; print(os.environ.get('MUJOCO_GL'))"
    for gl in ("", "osmesa"):
        assert python(code, tmp_path, "none.py", "", gl).stdout.strip() == (gl or "None")


def test_a_broken_mujoco_is_one_line(tmp_path):
    done = python(STEP, tmp_path, "mujoco/__init__.py", BROKEN, "")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "core bindings are missing" in done.stderr and "pip uninstall" in done.stderr
