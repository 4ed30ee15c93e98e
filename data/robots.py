"""The four arms: their numbers (robots.json), their MuJoCo bodies, and their kinematics.

In: a name. Out: `Robot` (numbers), `robot_xml` (an MJCF fragment of capsules, position servos and a parallel gripper) and `Kinematics`.
The tool frame (TCP) has z along the approach direction and y along the closing axis; its origin lies between the finger tips.

State, in this order (S = dof + 10):   joint angles (dof) rad | finger travel 1 m | TCP position 3 m | first two columns of the TCP rotation 6
Action, in this order (A = dof + 1):   joint targets (dof) rad | finger target 1 m, below zero presses on what is held
Both are in the robot's base frame. A new robot is one entry of robots.json.
"""
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import mujoco
import numpy as np

from cli import choose

SQUEEZE = -0.01          # m: the finger target that means "closed"; 10 mm beyond contact, as in ManiSkill, so that a held cube is pressed with 30 N
FINGER_DAMPING = 75      # N s/m, of the joint and not of the servo: a servo at its force limit would not feel it, and would chatter for ever
PAD_FRICTION = 1.15      # PhysX averages pads 2.0 and objects 0.3; MuJoCo takes the larger of the two, so the pads carry the average
NUMBERS = json.loads((Path(__file__).parent / "robots.json").read_text())["robots"]
ROBOTS = tuple(NUMBERS)


@dataclass(frozen=True)
class Robot:
    """One entry of robots.json, with the few numbers derived from it."""
    name: str
    numbers: dict

    def __getattr__(self, key):
        try:
            return self.numbers[key]
        except KeyError:
            raise AttributeError(key) from None

    @property
    def dof(self):
        return len(self.numbers["joints"])

    @property
    def state_dim(self):
        return self.dof + 10

    @property
    def action_dim(self):
        return self.dof + 1

    @property
    def travel(self):
        """Finger travel each, open (m)."""
        return self.fingers["travel"]

    @property
    def home(self):
        return np.array(self.home_qpos)

    @property
    def joint_range(self):
        """(dof, 2) rad."""
        return np.array([joint["range"] for joint in self.joints])

    @property
    def velocity_limit(self):
        """(dof,) rad/s."""
        return np.array([joint["velocity_limit"] for joint in self.joints])

    def clip(self, action):
        """The action (A,) inside the arm's joint and finger limits."""
        low, high = self.joint_range.T
        return np.concatenate([np.clip(action[:-1], low, high), np.clip(action[-1:], SQUEEZE, self.travel)])


@cache
def get_robot(name):
    """The Robot called `name`; UserError lists the names that exist."""
    return Robot(choose(name, ROBOTS, "robot"), NUMBERS[name])


def row(values):
    return " ".join(f"{v:.9g}" for v in values)


def capsules(items, colour):
    return "".join(f'<geom type="capsule" fromto="{row(c[:6])}" size="{c[6]}" rgba="{row(colour)}" class="link"/>' for c in items)


def finger_xml(robot, side):
    """One finger, a body sliding along its own +y; the right one is turned by half a turn."""
    f, (hx, hy, hz) = robot.fingers, robot.fingers["pad_half_size"]
    root, pad = f["root_z"], f["pad_centre_z"]
    middle, half = (root + pad - hz) / 2, (pad - hz - root) / 2
    back, colour = hy + 0.006, row(robot.colour_gripper)     # the finger's body stands behind the pad's face, so only the pads touch what is held
    # the pad takes a lighter shade, to be seen
    return f'''<body name="{side}_finger" pos="0 0 0" quat="{"1 0 0 0" if side == "left" else "0 0 0 1"}" gravcomp="1">
      <inertial pos="0 0.01 {pad}" mass="{f["mass"]}" diaginertia="3e-5 3e-5 1e-5"/>
      <joint name="{side}_finger" type="slide" axis="0 1 0" range="0 {robot.travel}" armature="0.05" damping="{FINGER_DAMPING}" solreflimit="0.01 1" solimplimit="0.95 0.99 0.001"/>
      <geom type="box" pos="0 {back} {middle}" size="{hx} 0.006 {max(half, 0.004)}" rgba="{colour}" class="link"/>
      <geom type="box" pos="0 {back + 0.002} {pad}" size="{hx} 0.006 {hz}" rgba="{colour}" class="link"/>
      <geom name="{side}_pad" type="box" pos="0 {hy} {pad}" size="{hx} {hy} {hz}" rgba="0.45 0.45 0.48 1" friction="{PAD_FRICTION} 0.02 0.001" class="pad"/>
    </body>'''


def camera_axes(direction, up):
    """MJCF xyaxes of a camera looking along `direction` with `up` pointing up in the picture."""
    z = -np.asarray(direction, float) / np.linalg.norm(direction)
    x = np.cross(up, z)
    x /= np.linalg.norm(x)
    return row([*x, *np.cross(z, x)])


def robot_xml(robot, base_pos=(0.0, 0.0, 0.0)):
    """(body, actuators and the rest): MJCF fragments of the arm with its base at `base_pos` (m)."""
    cam, hand = robot.wrist_camera, robot.hand
    # the picture's top points away from the finger tips' far side: for a hand pointing down, away from the robot
    camera = f'<camera name="wrist" pos="{row(cam["pos"])}" xyaxes="{camera_axes(cam["direction"], (1, 0, 0) if cam["direction"][2] == 1 else (0, 0, 1))}" fovy="90"/>'
    inertial = f'<inertial pos="{row(hand["com"])}" mass="{hand["mass"]}" diaginertia="{row(hand["inertia"])}"/>' if hand["mass"] else ""
    inner = f'''<body name="hand" pos="{row(hand["pos"])}" quat="{row(hand["quat"])}" gravcomp="1">{inertial}
      {capsules(hand["capsules"], robot.colour_gripper)}
      <site name="tcp" pos="0 0 {robot.tcp_z}" size="0.004" rgba="0 0 0 0"/>{camera if cam["frame"] == "hand" else ""}
      {finger_xml(robot, "left")}{finger_xml(robot, "right")}</body>{camera if cam["frame"] == "flange" else ""}'''
    for i, j in reversed(list(enumerate(robot.joints))):
        colour = robot.colour if i % 2 == 0 else robot.colour_accent if robot.dof - i <= 2 else robot.colour
        inner = f'''<body name="link{i + 1}" pos="{row(j["pos"])}" quat="{row(j["quat"])}" gravcomp="1">
          <inertial pos="{row(j["com"])}" quat="{row(j["inertia_quat"])}" mass="{j["mass"]}" diaginertia="{row(j["inertia"])}"/>
          <joint name="joint{i + 1}" axis="{row(j["axis"])}" range="{row(j["range"])}" armature="{j["armature"]}" damping="{j["damping"]}" frictionloss="{j["frictionloss"]}"/>
          {capsules(j["capsules"], colour)}{inner}</body>'''
    body = f'<body name="base" pos="{row(base_pos)}">{capsules(robot.base["capsules"], robot.colour_accent)}{inner}</body>'
    servos = "".join(f'<position joint="joint{i + 1}" kp="{j["kp"]}" kv="{j["kd"]}" ctrlrange="{row(j["range"])}" forcerange="{-j["force_range"]} {j["force_range"]}"/>'
                     for i, j in enumerate(robot.joints))
    f = robot.fingers          # one servo pulls a tendon that shares its force between the fingers; an equality keeps the grip centred
    servos += (f'<position tendon="fingers" kp="{2 * f["kp"]}" ctrlrange="{SQUEEZE} {robot.travel}" forcerange="{-2 * f["force"]} {2 * f["force"]}"/>')
    links = ["base"] + [f"link{i + 1}" for i in range(robot.dof)] + ["hand"]
    # neighbours' capsules overlap at the joints; links more than three apart are checked against each other
    excluded = "".join(f'<exclude body1="{a}" body2="{b}"/>' for i, a in enumerate(links) for b in links[i + 1:i + 4])
    excluded += "".join(f'<exclude body1="{side}_finger" body2="{link}"/>' for side in ("left", "right") for link in links[-4:])
    excluded += '<exclude body1="left_finger" body2="right_finger"/>'      # their joints' limits keep them apart: pads pressed through each other would lock
    rest = f'''<tendon><fixed name="fingers"><joint joint="left_finger" coef="0.5"/><joint joint="right_finger" coef="0.5"/></fixed></tendon>
      <actuator>{servos}</actuator>
      <equality><joint joint1="right_finger" joint2="left_finger" polycoef="0 1 0 0 0" solref="0.005 1"/></equality>
      <contact>{excluded}</contact>'''
    return body, rest


DEFAULTS = '''<option timestep="0.0025" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <compiler angle="radian" autolimits="true"/>
  <default>
    <geom friction="0.3 0.005 0.0001" condim="3"/>
    <default class="link"><geom friction="0.3 0.005 0.0001" group="1"/></default>
    <default class="pad"><geom group="1" condim="4" solref="0.005 1" solimp="0.95 0.99 0.001"/></default>
  </default>'''


class Kinematics:
    """Forward and inverse kinematics of one arm, in its base frame, from MuJoCo's own chain.

    forward(qpos (dof,)) -> position (3,) m, rotation (3, 3) of the TCP.
    inverse(position, rotation, start) -> qpos (dof,) inside the joint limits, or None if the pose is out of reach.
    """

    def __init__(self, robot):
        self.robot = robot
        body, rest = robot_xml(robot)
        self.model = mujoco.MjModel.from_xml_string(f"<mujoco>{DEFAULTS}<worldbody>{body}</worldbody>{rest}</mujoco>")
        self.data = mujoco.MjData(self.model)
        self.site = self.model.site("tcp").id
        self.low, self.high = robot.joint_range.T

    def forward(self, qpos):
        self.data.qpos[:self.robot.dof] = qpos
        mujoco.mj_kinematics(self.model, self.data)
        return self.data.site_xpos[self.site].copy(), self.data.site_xmat[self.site].reshape(3, 3).copy()

    def solve_ik(self, position, rotation, start, iterations=80, tolerance=1e-3):
        """Damped least squares with clamped joints; for seven joints the null space leans towards `start`."""
        dof, q = self.robot.dof, np.clip(start, self.low, self.high)
        jac_p, jac_r = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        for _ in range(iterations):
            at, turned = self.forward(q)
            error = np.concatenate([position - at, rotation_vector(rotation @ turned.T)])
            if np.abs(error[:3]).max() < tolerance / 5 and np.abs(error[3:]).max() < tolerance:
                return q
            mujoco.mj_comPos(self.model, self.data)
            mujoco.mj_jacSite(self.model, self.data, jac_p, jac_r, self.site)
            jac = np.concatenate([jac_p[:, :dof], jac_r[:, :dof]])
            inverse = jac.T @ np.linalg.inv(jac @ jac.T + 1e-4 * np.eye(6))
            step = inverse @ error
            if dof > 6:
                step += (np.eye(dof) - inverse @ jac) @ (0.1 * (start - q))
            q = np.clip(q + step * min(1.0, 0.4 / (np.abs(step).max() + 1e-9)), self.low, self.high)
        return None


def rotation_vector(rotation):
    """Axis times angle (3,) rad of a rotation matrix (3, 3)."""
    quat, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quat, rotation.ravel())
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector


@cache
def get_kinematics(name):
    return Kinematics(get_robot(name))
