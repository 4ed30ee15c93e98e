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
FILES = [path.stem for path in whole_files(ARMS, "*.xml")]
ROBOTS = tuple(dict.fromkeys([*SHIPPED, *FILES]))

# In each arm's file, which explains them: rad, rad/s, m, kg, N.
NUMBERS = (
    "home",
    "velocity_limit",
    "reach",
    "spawn_distance",
    "spawn_half_size",
    "max_goal_height",
    "scale",
    "cube_half",
    "cube_mass",
    "goal_radius",
    "grasp_force",
)

# The finger target that means "closed", m: 10 mm beyond contact, as in ManiSkill, so that a held
# cube is pressed with 30 N. For jaws that turn on stiffer servos it is the one that does so.
SQUEEZE = -0.01
FORCE = 30.0  # N
LEAN = 0.25  # rad, of the hand of an arm of five joints


class Robot:
    """One arm: its compiled model, and the numbers in its file. UserError if the file is broken.

    Of NUMBERS, home and velocity_limit are (dof,), reach is (2,), the others are scalars.
    """

    def __init__(self, name, path):
        self.name = name
        self.path = Path(path)
        with reading(path, "delete it, or make it again with data.add_robot"):
            spec = mujoco.MjSpec.from_file(str(path))
            self.model = spec.compile()
            # what MJCF has no place for stands in the file's custom section
            self.display_name = spec.text("display_name").data
            for field in NUMBERS:
                numbers = self.model.numeric(field).data
                setattr(self, field, numbers if len(numbers) > 1 else numbers[0])
            # the rest follows
            self.dof = len(self.home)
            self.state_dim = self.dof + 10
            self.action_dim = self.dof + 1
            self.joint_range = self.model.jnt_range[: self.dof]  # (dof, 2) rad
            self.find_fingers()

    def find_fingers(self):
        """Set how far the fingers open, how stiff they are, and where they close."""
        self.jaws = None  # of jaws that turn (data/add_jaws.py): openings m, controls, angles rad
        self.squeeze = SQUEEZE  # m, the target that presses what is held
        self.fist = 0.0  # m along the closing axis, from the tool's place to the closed fingers
        names = [self.model.numeric(i).name for i in range(self.model.nnumeric)]
        numbers = {name: self.model.numeric(name).data for name in names}
        if "jaw_openings" in names:
            openings = numbers["jaw_openings"]
            angles = numbers["jaw_angles"].reshape(len(openings), -1)
            self.jaws = (openings, numbers["jaw_controls"], angles)
            self.travel = openings[-1]
            self.finger_kp = numbers["jaw_stiffness"][0]
            self.squeeze = max(SQUEEZE, 0.02 - FORCE / self.finger_kp)  # for a cube, half its side
            self.fist = numbers["jaw_fist"][0]
        else:
            self.travel = self.model.joint("left_finger").range[1]  # of either finger, m
            # N/m of either finger: the last servo drives both
            self.finger_kp = self.model.actuator_gainprm[self.dof, 0] / 2

    def clip(self, action):
        """The action (A,) inside the arm's joint and finger limits."""
        low, high = self.joint_range.T
        return np.clip(action, [*low, SQUEEZE], [*high, self.travel])

    # ---- one number says how far the fingers are open; of jaws that turn it is not their joints'

    def finger_control(self, finger):
        """What the fingers' servo is told for a target (m)."""
        if self.jaws is None:
            return finger
        openings, controls, _ = self.jaws
        return np.interp(finger, openings, controls)

    def finger_joints(self, opening):
        """The places of all joints of the fingers at an opening (m)."""
        if self.jaws is None:
            return [opening, opening]
        openings, _, angles = self.jaws
        return [np.interp(opening, openings, angle) for angle in angles.T]

    def opening(self, qpos):
        """m, of a scene's qpos, in which the fingers' joints follow the arm's."""
        if self.jaws is None:
            return qpos[self.dof]
        openings, _, angles = self.jaws
        # the joint that turns the most tells the most
        joint = np.ptp(angles, axis=0).argmax()
        rising = np.sign(angles[-1, joint] - angles[0, joint])
        angle = rising * qpos[self.dof + joint]
        return max(0.0, np.interp(angle, rising * angles[:, joint], openings))


@cache
def get_robot(name):
    """The Robot called `name`, or that of an arm's file elsewhere. UserError lists the names."""
    if name.endswith(".xml"):
        return Robot(name, name)
    return Robot(name, ARMS / f"{choose(name, ROBOTS, 'robot')}.xml")


class Kinematics:
    """Forward and inverse kinematics of one arm, in its base frame, by MuJoCo's own chain."""

    def __init__(self, robot):
        self.robot = robot
        self.model = robot.model
        self.data = mujoco.MjData(self.model)
        self.tcp = self.data.site("tcp")

    def forward(self, qpos):
        """TCP position (3,) m and rotation (3, 3) at the joint angles qpos (dof,) rad."""
        self.data.qpos[: self.robot.dof] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        return self.tcp.xpos.copy(), self.tcp.xmat.reshape(3, 3).copy()

    def solve_ik(self, position, rotation, start):
        """qpos (dof,) rad inside the limits that reaches a TCP pose; None if none is found.

        To 0.2 mm and 1 mrad. Damped least squares from `start` (dof,), joints clamped; a seventh
        joint leans towards `start` in the null space. Five joints cannot choose how far the hand
        leans sideways: that comes as it comes, up to LEAN.
        """
        dof = self.robot.dof
        low, high = self.robot.joint_range.T
        # a start outside the limits would be a solution outside them
        q = np.clip(start, low, high)
        jac = np.zeros((6, self.model.nv))
        quat = np.empty(4)
        error = np.empty(6)  # what is missing, in the base frame
        exact = np.repeat([2e-4, 1e-3], 3)
        for _ in range(80):
            at, turned = self.forward(q)
            error[:3] = position - at
            mujoco.mju_mat2Quat(quat, (rotation @ turned.T).ravel())
            mujoco.mju_quat2Vel(error[3:], quat, 1.0)
            if (np.abs(error) < exact).all():
                return q
            mujoco.mj_comPos(self.model, self.data)
            mujoco.mj_jacSite(self.model, self.data, jac[:3], jac[3:], self.tcp.id)
            J = jac[:, :dof]  # (6, dof), without the fingers
            missing = error
            if dof == 5:
                turns = turns_in_place(J)
                missing = np.append(error[:3], turns @ error[3:])
                J = np.vstack([J[:3], turns @ J[3:]])
                leans = np.linalg.norm(error[3:]) < LEAN
                if leans and (np.abs(missing) < exact[:5]).all():
                    return q
            # damping: near a singularity a step stays small
            inverse = J.T @ np.linalg.inv(J @ J.T + 1e-4 * np.eye(len(J)))
            step = inverse @ missing
            if dof > 6:  # what does not move the tool
                still = np.eye(dof) - inverse @ J
                step += still @ (0.1 * (start - q))
            longest = np.abs(step).max() + 1e-9  # rad; steps are at most 0.4 long
            q = np.clip(q + step * min(1.0, 0.4 / longest), low, high)
        return None


def turns_in_place(J):
    """(2, 3): the axes about which five joints turn the tool where it is. J (6, 5) its Jacobian."""
    _, _, directions = np.linalg.svd(J[:3])
    axes, _ = np.linalg.qr(J[3:] @ directions[3:].T)  # of what does not move the tool
    return axes.T


@cache
def get_kinematics(name):
    """The Kinematics of the arm called `name`."""
    return Kinematics(get_robot(name))
