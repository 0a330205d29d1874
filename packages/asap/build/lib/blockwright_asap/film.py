"""A filmstrip and an animation of the leap: reference, before and after tuning. Rendered without a display."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from blockwright_asap.gap import NONE
from blockwright_asap.ppo import ActorCritic
from blockwright_asap.robot import NQ, model
from blockwright_asap.study import Study
from blockwright_asap.tracking import Tracking, roll_out

FRAMES = (20, 30, 36, 42, 48, 54, 70, 90)
WIDTH, HEIGHT = 260, 200


def draw(study: Study, tuned: ActorCritic, method: str, folder: Path) -> str:
    """Write ``filmstrip.png`` and ``leap.gif``.

    Returns:
        what was drawn, or why nothing was
    """
    os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        from PIL import Image

        renderer = mujoco.Renderer(model(), HEIGHT, WIDTH)
    except Exception as error:  # no package, no library, no driver: each says so in its own way
        return f"no film: {type(error).__name__}: {error}"
    motion = study.reference.names.index("leap")
    rows = {
        "reference": study.reference.qpos[motion],
        "before, in the simulator": _leap(study, study.policy, [NONE], motion),
        "before, in the real": _leap(study, study.policy, study.gaps(3, 1000), motion),
        f"tuned by {method}, in the real": _leap(study, tuned, study.gaps(3, 1000), motion),
    }
    strips = [np.concatenate([_labelled(_picture(renderer, q[k]), "") for k in FRAMES], 1) for q in rows.values()]
    strips = [_labelled(strip, name) for strip, name in zip(strips, rows, strict=True)]
    Image.fromarray(np.concatenate(strips)).save(folder / "filmstrip.png")
    shown = [name for name in rows if name != "before, in the simulator"]
    frames = [
        Image.fromarray(np.concatenate([_labelled(_picture(renderer, rows[name][k]), name) for name in shown], 1))
        for k in range(0, len(rows["reference"]), 2)
    ]
    frames[0].save(folder / "leap.gif", save_all=True, append_images=frames[1:], duration=40, loop=0)
    return "filmstrip.png, leap.gif"


def _leap(study: Study, net: ActorCritic, gaps: list[Any], motion: int) -> np.ndarray:
    count = len(study.reference.names)
    found = roll_out(Tracking(study.reference, (gaps * count)[:count]), net, 3)
    return found.states[:, motion, :NQ]


def _picture(renderer: mujoco.Renderer, qpos: np.ndarray) -> np.ndarray:
    data, camera = mujoco.MjData(model()), mujoco.MjvCamera()
    data.qpos[:] = qpos
    mujoco.mj_forward(model(), data)
    camera.type, camera.distance, camera.azimuth, camera.elevation = mujoco.mjtCamera.mjCAMERA_FREE, 1.5, 90, -8
    camera.lookat[:] = [0.2, 0, 0.25]
    renderer.update_scene(data, camera)
    return renderer.render().copy()


def _labelled(picture: np.ndarray, text: str) -> np.ndarray:
    from PIL import Image, ImageDraw

    image = Image.fromarray(picture)
    ImageDraw.Draw(image).text((6, 4), text, fill=(20, 20, 20))
    return np.asarray(image)
