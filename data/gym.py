"""The simulator as gymnasium environments: one id for every task and every family of scenes.

    import gymnasium
    import data.gym

    env = gymnasium.make("nanoblm/PickCube-v0", robot="widowx")
    observation, info = env.reset(seed=3, options={"instruction": "Pick up the red cube."})

Needs `pip install -r requirements-gym.txt`.
"""

import numpy as np

from cli import UserError
from data.env import IMAGE_SIZE, VIEWS, TabletopEnv
from data.families import FAMILIES
from data.robots import SQUEEZE
from data.tasks import TASKS
from files import reading

with reading("gymnasium", "`pip install -r requirements-gym.txt`"):
    import gymnasium
    from gymnasium import spaces

LONGEST = 1000  # characters of an instruction
OPTIONS = ("command", "instruction")


def action_space(robot):
    """Joint targets (rad) within the arm's limits, and the finger target (m)."""
    low, high = robot.joint_range.T
    low = np.array([*low, SQUEEZE], np.float32)
    high = np.array([*high, robot.travel], np.float32)
    return spaces.Box(low, high)


def observation_space(robot):
    """The space of `TabletopEnv.observe`."""
    pixels = spaces.Box(0, 255, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    # contacts push joints slightly beyond their limits, and only the arm's length limits the tool's
    # position, so only the columns of its rotation get real bounds
    state = np.full(robot.state_dim, np.inf, np.float32)
    state[-6:] = 1 + 1e-5  # tolerance for rounding
    printable = "".join(map(chr, range(32, 127)))
    return spaces.Dict(
        {
            "images": spaces.Dict(dict.fromkeys(VIEWS, pixels)),
            "state": spaces.Box(-state, state),
            "instruction": spaces.Text(LONGEST, charset=printable),
        }
    )


class GymEnv(gymnasium.Env):
    """A TabletopEnv with spaces. Further options, such as perturbation, are passed to it."""

    metadata = {"render_modes": []}  # noqa: RUF012, gymnasium reads it from the class

    def __init__(self, scene, robot="widowx", **options):
        self.table = TabletopEnv(robot, scene, **options)
        self.action_space = action_space(self.table.robot)
        self.observation_space = observation_space(self.table.robot)

    def reset(self, *, seed=None, options=None):
        """seed determines the layout; without one it is random. options: see OPTIONS."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := options.keys() - set(OPTIONS):
            raise UserError(f"options {sorted(unknown)}: there are {', '.join(OPTIONS)}")
        layout = int(self.np_random.integers(2**31)) if seed is None else seed
        return self.table.reset(layout, **options)

    def step(self, action):
        """terminated: the task is done, reward 1. truncated: out of time."""
        *result, info = self.table.step(action)
        # a copy, because the table keeps counting in its own dict
        info["clipped"] = dict(info["clipped"])
        return *result, info

    def close(self):
        self.table.close()


for name in (*TASKS, *FAMILIES):
    # no max_episode_steps: the table ends its episodes itself
    gymnasium.register(f"nanoblm/{name}-v0", f"{__name__}:GymEnv", kwargs={"scene": name})
