"""Pictures of a study: the leap before and after tuning, filmed, and plots with 95 % intervals over seeds.

MuJoCo reads ``MUJOCO_GL`` when it is imported: ``egl`` or ``osmesa`` renders without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

from blockwright_asap.ppo import ActorCritic
from blockwright_asap.replacing import replaced
from blockwright_asap.robot import DT, NQ, model
from blockwright_asap.study import Study
from blockwright_asap.tracking import Tracking, roll_out
from blockwright_asap.world import NONE

FRAMES = (20, 30, 36, 42, 48, 54, 70, 90)
WIDTH, HEIGHT = 260, 200


def film(study: Study, tuned: ActorCritic, method: str, folder: Path) -> str:
    """Write ``filmstrip.png`` and ``leap.gif``.

    Returns:
        what was drawn, or why nothing was
    """
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
        f"after ({method}), in the real": _leap(study, tuned, study.gaps(3, 1000), motion),
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


Results = Sequence[Mapping[str, Any]]
CLOSED, OPEN = "E_g-mpjpe in the real, mm", "E_g-mpjpe, mm"


def plot(folder: Path, results: Results, names: Mapping[str, str]) -> list[Path]:
    """Write all plots.

    Args:
        folder: of the files
        results: of each seed
        names: rows, in their order → what a reader sees
    """
    figures = {
        "open_loop": _over_time(results, "open", names, "Open loop: real commands replayed", "replayed, s"),
        "closed_loop": _bars(results, names),
        "closed_loop_over_time": _over_time(results, "closed", names, "Closed loop in the real", "s"),
    }
    for name, figure in figures.items():
        with replaced(folder / f"{name}.svg") as partial:
            figure.savefig(partial)
    return [folder / f"{name}.svg" for name in figures]


def _over_time(results: Results, part: str, names: Mapping[str, str], title: str, x: str) -> Figure:
    figure, axes = _figure()
    for number, name in enumerate(n for n in names if any(n in r[part] for r in results)):
        lines = np.array([r[part][name]["over_time"] for r in results if name in r[part]])
        at = np.arange(1, lines.shape[1] + 1) * DT
        (line,) = axes.plot(at, lines.mean(0), label=names[name], linestyle=("-", "--")[number // 10 % 2])
        if len(lines) > 1:
            half = _half(lines)
            axes.fill_between(at, lines.mean(0) - half, lines.mean(0) + half, alpha=0.12, color=line.get_color())
    top = max(max(row["over_time"]) for r in results for row in r[part].values())
    axes.set(xlabel=x, ylabel=OPEN, title=title, ylim=(0, 1.05 * top))
    axes.legend(fontsize=7, frameon=False)
    return figure


def _bars(results: Results, names: Mapping[str, str]) -> Figure:
    figure, axes = _figure()
    rows = [name for name in names if any(name in r["closed"] for r in results)]
    for place, name in enumerate(rows):
        seeds = np.array([[r["closed"][name]["all"]["g_mpjpe"]] for r in results if name in r["closed"]])
        half = _half(seeds)[0] if len(seeds) > 1 else None
        axes.barh(place, seeds.mean(), xerr=half, color="#9db8d2", error_kw={"elinewidth": 1, "capsize": 2})
        axes.plot(seeds[:, 0], [place] * len(seeds), ".", color="#203040", markersize=5)
    axes.set_yticks(range(len(rows)), [names[name] for name in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=CLOSED, title="Closed loop; dots are seeds", xlim=(0, None))
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    return figure, figure.subplots()


def _half(lines: np.ndarray) -> np.ndarray:
    """Half of the 95 % interval of the mean over the first axis."""
    return student.ppf(0.975, len(lines) - 1) * lines.std(0, ddof=1) / np.sqrt(len(lines))
