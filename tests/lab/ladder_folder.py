"""Folders of ladders as their jobs leave them, with losses of a law that is known."""

import json

import numpy as np
from ladders import EXPONENT, loss

from blockwright.lab.ladder.design import Cell, Outline, Size, compared
from blockwright.lab.sweep import plan as plans


def outline(gains, sizes=4, seeds=3, ratios=(5, 10, 20)):
    """An outline without tuning; the first arm is the baseline."""
    of = {}
    for i in range(sizes):
        parameters = 1e5 * 2**i
        steps = {f"{ratio} tokens per parameter": round(parameters * ratio / 1000) for ratio in ratios}
        of[f"d{i}"] = Size(steps, {arm: Cell((f"arm={arm}",), parameters, 6 * parameters) for arm in gains})
    return Outline(next(iter(gains)), of, 1000, 0.2, 0.02, tuple(range(seeds)))


def write(directory, gains, noise=0.005, exponent=EXPONENT, lost=None, **shape):
    """A ladder that has ended: arm → ρ_N and ρ_D, the noise of a training, β of the second arm, a job that failed."""
    return write_of(directory, outline(gains, **shape), gains, noise, exponent, lost)


def write_of(directory, own, gains, noise=0.005, exponent=EXPONENT, lost=None):
    """A ladder of this outline that has ended; arms that ``gains`` does not name gain nothing."""
    gains = {arm: gains.get(arm, (1, 1)) for arm in next(iter(own.sizes.values())).arms}
    jobs = compared(own, {}, 0)
    plan = {"kind": "ladder", "name": "mine", "command": "blockwright ladder mine", "metric": "val/loss", "workers": 1}
    arms = [{"name": arm, "overrides": [], "baseline": arm == own.baseline} for arm in gains]
    plans.write(directory, {**plan, "direction": "minimize", "jobs": jobs, "arms": arms, "ladder": own.as_plain()})
    rng, shared = np.random.default_rng(1), {}
    for job in jobs:
        pair = shared.setdefault((job["size"], job["duration"], job["seed"]), rng.standard_normal())
        trunk = shared.setdefault((job["size"], job["arm"], job["seed"]), rng.standard_normal())
        of_size, of_data = gains[job["arm"]]
        beta = exponent if job["arm"] == list(gains)[1] else EXPONENT
        value = loss(of_size * job["parameters"], of_data * job["tokens"], beta)
        value += noise * float(0.5**0.5 * pair + 0.2**0.5 * trunk + 0.3**0.5 * rng.standard_normal())
        finish(directory, job["job"], value, "failed" if job["job"] == lost else "completed")
    return directory


def finish(directory, job, value, status="completed"):
    """The result of a job."""
    folder = directory / str(job)
    folder.mkdir(exist_ok=True)
    metrics = {"val/loss": value, "speed/tokens_per_second": 2000.0}
    (folder / "results.json").write_text(json.dumps({"status": status, "reason": "", "metrics": metrics}))
