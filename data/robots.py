"""The arms, one MJCF file each in data/arms/, and their kinematics.

The tool frame (TCP) has z along the approach direction and y along the closing axis; its origin
lies between the finger tips. Both vectors below are in the robot's base frame, in this order:

    state  (S = dof + 10)  joint angles (dof) rad | travel of a finger 1 m | TCP position 3 m |
                           first two columns of the TCP rotation 6
    action (A = dof + 1)   joint targets (dof) rad | finger target 1 m, below zero presses

A new arm is one more file: data/add_robot.py makes it from your own MJCF.
"""

from functools import cache
from pathlib import Path

import numpy as np

from cli import choose
from data.simulator import mujoco
from files import reading, whole_files

ARMS = Path(__file__).parent / "arms"
SHIPPED = ("panda", "xarm6", "xarm7", "widowx")  # tables and seeds of scenes go by this order
ADDED = {path.stem for path in whole_files(ARMS, "*.xml")} - set(SHIPPED)
ROBOTS = (*SHIPPED, *sorted(ADDED))

# The finger target that means "closed", m: 10 mm beyond contact, as in ManiSkill, so that a held
# cube is pressed with 30 N.
SQUEEZE = -0.01


class Robot:
    """One arm: its compiled model, and the numbers in its file. UserError if the file is broken.

    home (dof,) rad, velocity_limit (dof,) rad/s, reach (2,) m, and scalars; the file explains them.
    """

    def __init__(self, name, path):
        self.name = name
        self.path = Path(path)
        with reading(path, "delete it, or make it again with data.add_robot"):
            # what MJCF has no place for stands in the file's custom section
            spec = mujoco.MjSpec.from_file(str(path))
            self.model = spec.compile()
            numbers = {}
            for numeric in spec.numerics:
                numbers[numeric.name] = np.array(numeric.data)
            self.display_name = spec.text("display_name").data
            self.home = numbers["home"]
            self.velocity_limit = numbers["velocity_limit"]
            self.reach = numbers["reach"]
            self.spawn_distance = numbers["spawn_distance"].item()
            self.spawn_half_size = numbers["spawn_half_size"].item()
            self.max_goal_height = numbers["max_goal_height"].item()
            self.scale = numbers["scale"].item()
            self.cube_half = numbers["cube_half"].item()
            self.cube_mass = numbers["cube_mass"].item()
            self.goal_radius = numbers["goal_radius"].item()
            self.grasp_force = numbers["grasp_force"].item()
            # the rest follows
            self.dof = len(self.home)
            self.state_dim = self.dof + 10
            self.action_dim = self.dof + 1
            self.joint_range = self.model.jnt_range[: self.dof]  # (dof, 2) rad
            self.travel = self.model.joint("left_finger").range[1]  # of either finger, m
            # N/m of either finger: the last servo drives both
            self.finger_kp = self.model.actuator_gainprm[self.dof, 0] / 2

    def clip(self, action):
        """The action (A,) inside the arm's joint and finger limits."""
        low, high = self.joint_range.T
        lowest = np.append(low, SQUEEZE)
        highest = np.append(high, self.travel)
        return np.clip(action, lowest, highest)


@cache
def get_robot(name):
    """The Robot called `name`. UserError lists the names that exist."""
    return Robot(name, ARMS / f"{choose(name, ROBOTS, 'robot')}.xml")


class Kinematics:
    """Forward and inverse kinematics of one arm, in its base frame, by MuJoCo's own chain."""

    def __init__(self, robot):
        self.robot = robot
        self.model = robot.model
        self.data = mujoco.MjData(self.model)
        self.site = self.model.site("tcp").id

    def forward(self, qpos):
        """TCP position (3,) m and rotation (3, 3) at the joint angles qpos (dof,) rad."""
        self.data.qpos[: self.robot.dof] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        position = self.data.site_xpos[self.site].copy()
        rotation = self.data.site_xmat[self.site].copy()
        return position, rotation.reshape(3, 3)

    def solve_ik(self, position, rotation, start, iterations=80, tolerance=1e-3):
        """qpos (dof,) rad inside the limits that reaches a TCP pose; None if none is found.

        Damped least squares from `start` (dof,), joints clamped; a seventh joint leans towards
        `start` in the null space. tolerance: rad, a fifth of it in m.
        """
        dof = self.robot.dof
        low, high = self.robot.joint_range.T
        # a start outside the limits would be a solution outside them
        q = np.clip(start, low, high)
        jac = np.zeros((6, self.model.nv))
        for _ in range(iterations):
            at, turned = self.forward(q)
            turn = rotation_vector(rotation @ turned.T)  # what is missing, in the base frame
            error = np.concatenate([position - at, turn])
            near = np.abs(error[:3]).max() < tolerance / 5
            if near and np.abs(error[3:]).max() < tolerance:
                return q
            mujoco.mj_comPos(self.model, self.data)
            mujoco.mj_jacSite(self.model, self.data, jac[:3], jac[3:], self.site)
            J = jac[:, :dof]  # (6, dof), without the fingers
            # damping: near a singularity a step stays small
            inverse = J.T @ np.linalg.inv(J @ J.T + 1e-4 * np.eye(6))
            step = inverse @ error
            if dof > 6:  # what does not move the tool
                step += (np.eye(dof) - inverse @ J) @ (0.1 * (start - q))
            longest = np.abs(step).max() + 1e-9  # rad; steps are at most 0.4 long
            q = np.clip(q + step * min(1.0, 0.4 / longest), low, high)
        return None


def rotation_vector(rotation):
    """Axis times angle (3,) rad of a rotation matrix (3, 3)."""
    quat = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_mat2Quat(quat, rotation.ravel())
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector


@cache
def get_kinematics(name):
    """The Kinematics of the arm called `name`."""
    return Kinematics(get_robot(name))
