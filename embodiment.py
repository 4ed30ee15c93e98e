"""An embodiment: a robot's state and action sizes, cameras, control rate, and relative actions.

Episodes store their robot's embodiment (data/record.py), and policy.json those of a policy's
robots. It determines how observations are read and prompts built. The defaults are those of the
simulator's arms (data/robots.py).
"""

import re
from dataclasses import dataclass

VIEWS = ("front", "wrist")  # cameras of the simulator's arms
MOST_VIEWS = 3
VIEW_NAME = r"\w[\w.-]*"  # allowed camera names
CONTROL_HZ = 20
# order and units, for readers of policy.json; the frames are explained in data/robots.py
STATE = "joint angles (rad), finger (m), TCP position (m), first two columns of its rotation"
ACTION = "joint targets (rad), finger target (m)"


@dataclass
class Embodiment:
    """One robot as policy.json stores it. AssertionError if the values are invalid."""

    state_dim: int  # S
    action_dim: int  # A
    views: tuple = VIEWS  # one to MOST_VIEWS cameras, in the order of the prompt
    # For each action dimension, the index of the state dimension that it is a target for, and
    # relative to which it is learned. -1: learned as it is, like a finger's target or a delta.
    # None: all but the last are targets for the first state dimensions, in order.
    relative: tuple | None = None
    control_hz: float = CONTROL_HZ  # steps of a chunk per second
    state: str = STATE  # what the state's numbers are, in words
    action: str = ACTION

    def __post_init__(self):
        for name in ("state_dim", "action_dim"):
            size = getattr(self, name)
            assert type(size) is int and 0 < size < 1000, f"{name} is {size!r}"
        self.views = tuple(self.views)
        assert 1 <= len(self.views) <= MOST_VIEWS, f"{len(self.views)} cameras"
        assert len(set(self.views)) == len(self.views), "two cameras have the same name"
        for view in self.views:
            assert re.fullmatch(VIEW_NAME, view), f"a camera called {view!r}"
        if self.relative is None:
            self.relative = (*range(self.action_dim - 1), -1)
        self.relative = tuple(self.relative)
        assert len(self.relative) == self.action_dim, (
            "relative must have one entry per action dimension"
        )
        targets = [index for index in self.relative if index != -1]
        for index in targets:
            assert type(index) is int and 0 <= index < self.state_dim, f"relative to {index!r}"
        assert len(set(targets)) == len(targets), "two numbers are relative to the same one"
        hz = self.control_hz
        assert type(hz) in (int, float) and 0 < hz < 1000, f"control_hz is {hz!r}"
        for name in ("state", "action"):
            words = getattr(self, name)
            assert isinstance(words, str) and words, f"{name} is {words!r}"

    def shape(self):
        """What all episodes of a robot must share, in words.

        Does not include `relative`: episodes keep the value they were recorded with, and a policy
        that knows the robot uses its own.
        """
        numbers = f"{self.state_dim} and {self.action_dim} numbers of state and action"
        return f"{numbers}, cameras {', '.join(self.views)} at {self.control_hz:g} Hz"
