"""A planar quadruped: a front and a hind leg of two joints each, 12 kg, four position motors, ground contacts.

The model is this file: nothing is downloaded. Angles are in radians (MJCF's default is degrees). Positions of bodies
are those of their frames (``xbody``): those of a ``body`` are its centre of mass, and a shift of it would look like an
error.
"""

from __future__ import annotations

from functools import lru_cache

import mujoco
import numpy as np

from blockwright_asap.world import NONE, Gap

DT, SUBSTEPS = 0.02, 4  # control at 50 Hz, physics at 200 Hz, as in the paper
LINK, HALF = 0.2, 0.2  # m: thigh and shin; hips from the middle of the trunk
JOINTS = ("front_hip", "front_knee", "hind_hip", "hind_knee")
NU, NQ = 4, 7  # motors; coordinates: x, z, pitch, joints
NS = 2 * NQ  # numbers of a state: positions and velocities
KP, KD, TORQUE = 80.0, 2.5, 55.0
SCALE = 0.25  # action → joint target, as in the paper
DEFAULT = np.array([-0.75, 1.5, -0.75, 1.5])  # rad: standing
BODIES = (
    *(("xbody", "trunk"), ("site", "nose"), ("site", "tail"), ("xbody", "front_shin"), ("xbody", "hind_shin")),
    *(("site", "front_foot"), ("site", "hind_foot")),
)
TOP, FEET, NB = (1, 2), (5, 6), len(BODIES)
STANDING = 2 * LINK * np.cos(0.75) + 0.025  # m: height of the trunk


@lru_cache(maxsize=512)
def model(gap: Gap = NONE) -> mujoco.MjModel:
    """The robot in MuJoCo."""
    return mujoco.MjModel.from_xml_string(xml(gap))


def xml(gap: Gap = NONE) -> str:
    """The robot as MJCF. ``linkage`` and ``offset`` are not in it: they act on the command (world.py)."""
    motors = "".join(_motor(i, gap) for i in range(NU))
    sensors = "".join(f'<framepos objtype="{kind}" objname="{name}"/>' for kind, name in BODIES)
    ground = f'friction="{gap.friction} .01 .001"'
    free = 'damping="0" armature="0" limited="false"'
    return f"""<mujoco><compiler angle="radian"/>
<option timestep="{DT / SUBSTEPS}" integrator="implicitfast" iterations="8"/>
<visual><global offwidth="640" offheight="360"/></visual>
<default><joint damping=".2" armature=".01" limited="true"/>
  <geom contype="0" conaffinity="0" {ground} rgba=".75 .6 .4 1"/></default>
<asset><texture type="skybox" builtin="gradient" rgb1="1 1 1" rgb2=".8 .87 .93" width="64" height="64"/>
  <texture name="grid" type="2d" builtin="checker" rgb1=".87 .9 .92" rgb2=".77 .81 .84" width="300" height="300"/>
  <material name="grid" texture="grid" texrepeat="40 40"/></asset>
<worldbody><light pos="0 -2 4" dir="0 .4 -1" directional="true"/>
  <geom name="floor" type="plane" size="10 10 .1" contype="1" conaffinity="1" material="grid" rgba="1 1 1 1" {ground}/>
  <body name="trunk"><joint name="x" type="slide" axis="1 0 0" {free}/>
    <joint name="z" type="slide" axis="0 0 1" {free}/>
    <joint name="pitch" axis="0 -1 0" {free}/>
    <inertial pos="{gap.com_x} 0 {gap.com_z}" mass="{8 * gap.mass}" diaginertia=".02 .14 .14"/>
    <geom type="box" size="{HALF + 0.05} .08 .05" mass="0"/>
    <site name="nose" pos="{HALF + 0.05} 0 .05"/><site name="tail" pos="-{HALF + 0.05} 0 .05"/>
    {_leg("front", HALF, gap)}{_leg("hind", -HALF, gap)}</body></worldbody>
<actuator>{motors}</actuator><sensor>{sensors}</sensor></mujoco>"""


def _motor(i: int, gap: Gap) -> str:
    kp, kd, most = KP * gap.kp[i], KD * gap.kd[i], TORQUE * gap.torque
    lag = f'dyntype="filterexact" dynprm="{gap.motor_lag} 0 0"' if gap.motor_lag else ""
    gains = f'gaintype="fixed" biastype="affine" gainprm="{kp}" biasprm="0 {-kp} {-kd}"'
    return f'<general joint="{JOINTS[i]}" {lag} {gains} forcerange="{-most} {most}"/>'


def _leg(side: str, x: float, gap: Gap) -> str:
    joint = f'axis="0 -1 0" frictionloss="{gap.friction_loss}"'
    link = f'type="capsule" fromto="0 0 0 0 0 -{LINK}"'
    return f"""<body name="{side}_thigh" pos="{x} 0 0"><joint name="{side}_hip" range="-2 1.2" {joint}/>
      <geom {link} size=".03" mass="1.4"/>
      <body name="{side}_shin" pos="0 0 -{LINK}"><joint name="{side}_knee" range="0.1 2.6" {joint}/>
        <geom {link} size=".022" mass=".5"/>
        <geom type="sphere" pos="0 0 -{LINK}" size=".025" mass=".1" contype="1" conaffinity="1"/>
        <site name="{side}_foot" pos="0 0 -{LINK}"/></body></body>"""
