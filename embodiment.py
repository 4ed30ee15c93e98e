"""What is a robot's own: its numbers, its cameras, its clock, and what its actions are relative to.

An episode says it of its robot (data/record.py), a policy keeps it (policy.json), and observations
are read and prompts made by it. The defaults are those of the simulator's arms (data/robots.py).
"""

import re
from dataclasses import dataclass

VIEWS = ("front", "wrist")  # cameras of the simulator's arms
MOST_VIEWS = 3
VIEW_NAME = r"\w[\w.-]*"  # what a camera may be called
CONTROL_HZ = 20
# order and units, for whoever reads policy.json; the frames are in data/robots.py
STATE = "joint angles (rad), finger (m), TCP position (m), first two columns of its rotation"
ACTION = "joint targets (rad), finger target (m)"


@dataclass
class Embodiment:
    """A robot as it stands in policy.json; AssertionError if it cannot be one."""

    state_dim: int  # S
    action_dim: int  # A
    views: tuple = VIEWS  # its cameras, one to MOST_VIEWS, in the order of the prompt
    # For each number of the action the index of the state's number that it is a target for, and
    # is learned relative to; -1: it is learned as it is, as a finger's target or a delta.
    # None: all but the last are targets for the state's first.
    relative: tuple | None = None
    control_hz: float = CONTROL_HZ  # steps of a chunk a second
    state: str = STATE  # what its numbers are, in words
    action: str = ACTION

    def __post_init__(self):
        for name in ("state_dim", "action_dim"):
            size = getattr(self, name)
            assert type(size) is int and 0 < size < 1000, f"{name} is {size!r}"
        self.views = tuple(self.views)
        assert 1 <= len(self.views) <= MOST_VIEWS, f"{len(self.views)} cameras"
        assert len(set(self.views)) == len(self.views), "two cameras of one name"
        for view in self.views:
            assert re.fullmatch(VIEW_NAME, view), f"a camera called {view!r}"
        if self.relative is None:
            self.relative = (*range(self.action_dim - 1), -1)
        self.relative = tuple(self.relative)
        assert len(self.relative) == self.action_dim, "relative is not of the action's length"
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
        """In words, what all episodes of a robot must share.

        Not what its targets are relative to: they are kept as they were given, and a policy that
        knows the robot goes by its own.
        """
        numbers = f"{self.state_dim} and {self.action_dim} numbers of state and action"
        return f"{numbers}, cameras {', '.join(self.views)} at {self.control_hz:g} Hz"
