"""Sweep folders as training leaves them, with figures that are made up and known."""

import json
import math
import random

RATES = (0.0125, 0.025, 0.05, 0.1, 0.2)  # that are tried
COST = {"mha": (512, 1.00), "gqa": (256, 0.97), "mla": (144, 1.02), "moe": (512, 1.10)}


def write_job(sweep, number, overrides, results=None, curves=None):
    """One run's folder."""
    folder = sweep / str(number)
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text("".join(f"- {json.dumps(o)}\n" for o in overrides))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if curves is not None:
        (folder / "curves.json").write_text(json.dumps(curves))
    return folder


def completed(loss, **more):
    """results.json of a run that ended well."""
    metrics = {"val/loss": loss, "test/loss": loss + 0.01, "speed/tokens_per_second": 1000.0}
    figures = {"parameters": 1_000_000, "active_parameters": 900_000, "steps": 100, "fit_seconds": 12.5}
    return {"status": "completed", **figures, "metrics": metrics, "figures": described(metrics), **more}


def described(metrics, **other):
    """What results.json says of figures: of losses less is better, of speeds more, of others what is given."""
    usual = {"loss": "less", "bits_per_byte": "less", "perplexity": "less", "tokens_per_second": "more", **other}
    known = {name: usual[name.rpartition("/")[2]] for name in metrics if name.rpartition("/")[2] in usual}
    units = {name: "nats per token" if name.endswith("loss") else "" for name in known}
    return {name: {"unit": units[name], "better": better} for name, better in known.items()}


def falling(final, rng, steps=100, slower=1.0):
    """curves.json of a loss that falls like a power of the steps to ``final``."""
    power = 0.5 * slower
    at = range(10, steps + 1, 10)
    val = [(s, final + 1.6 * ((s / steps) ** -power - 1) + rng.gauss(0, 0.002) * (s < steps)) for s in at]
    return {
        "tokens_per_step": 2048,
        "train": [(s, loss + 0.02) for s, loss in val],
        "val": val,
        "flops_per_token": 1.3e7,
        "cache_bytes_per_token": 512.0,
        "expert_load": {},
    }


def ablation(sweep, seeds=3, effects=None):
    """Four arms, one of which fails everywhere, a diverged seed, a mixture of experts, a plan."""
    rng = random.Random(7)
    effects = {"mha": 0.0, "gqa": 0.003, "mla": -0.05, "moe": -0.12} if effects is None else effects
    names = [*effects, "broken <b>&"]
    base = {"params": 1_000_000, "active_params": 900_000, "flops": 1.3e7, "cache_bytes": 512}
    jobs = []
    noise = [rng.gauss(0, 0.02) for _ in range(seeds)]
    for arm in names:
        for seed in range(seeds):
            overrides = [f"model/attention={arm}", f"seed={seed}"]
            jobs.append({"job": len(jobs), "overrides": overrides, "arm": arm, "seed": seed, "lr": None})
            _job(sweep, jobs[-1], arm, effects, noise[seed], rng)
    plan = {"kind": "ablation", "name": "attention", "command": "blockwright ablate attention", "metric": "val/loss"}
    plan |= {"direction": "minimize", "workers": 1, "jobs": jobs, "definition": {}}
    plan["arms"] = [_planned(arm, base) for arm in names]
    (sweep / "plan.json").write_text(json.dumps(plan))
    return sweep


def _planned(arm, base):
    cache, size = COST.get(arm, (512, 1.0))
    figures = {**{k: v * size for k, v in base.items()}, "cache_bytes": cache}
    residual = {name: figures[name] / base[name] - 1 for name in base}
    changed = {"model.ffn.d_ff": [512, 736]}
    match = {"budget": "params", "by": "d_ff", "tol": 0.005, "changed": changed, "residual": residual}
    planned = {"name": arm, "baseline": arm == "mha", "overrides": [f"model/attention={arm}"], "figures": figures}
    return {**planned, "match": None if arm == "mha" else match}


def _job(sweep, job, arm, effects, of_seed, rng):
    if arm not in effects:
        reason = "ConfigError: model.attention = 'broken <b>&': <script>alert(1)</script> is unknown"
        write_job(sweep, job["job"], job["overrides"], {"status": "failed", "reason": reason})
        return
    loss = 2.0 + effects[arm] + of_seed + rng.gauss(0, 0.004)
    cache, size = COST.get(arm, (512, 1.0))
    curves = {**falling(loss, rng), "cache_bytes_per_token": cache, "flops_per_token": 1.3e7 * size}
    results = completed(loss, parameters=int(1_000_000 * size), active_parameters=int(900_000 * size))
    if arm == "gqa" and job["seed"] == 2:
        curves["val"], curves["train"] = curves["val"][:5], [*curves["train"][:5], (57, math.nan)]
        results = {"status": "diverged", "reason": "diverged at step 57: its loss is nan", "metrics": {}}
    if arm == "moe":
        curves["expert_load"] = {str(layer): _shares(8, rng) for layer in (1, 2, 3)}
    write_job(sweep, job["job"], job["overrides"], results, curves)


def _shares(n, rng):
    drawn = [math.exp(rng.gauss(0, 0.5)) for _ in range(n)]
    return [d / sum(drawn) for d in drawn]


def grid(sweep, losses, key="model/attention"):
    """A sweep without a plan; None is a run that has not ended."""
    rng, number = random.Random(1), 0
    for value, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds):
            overrides = ["trainer.max_steps=100", f"{key}={value}", f"seed={seed}"]
            results = None if loss is None else completed(loss)
            write_job(sweep, number, overrides, results, falling(loss or 2.0, rng))
            number += 1
    return sweep


def planned(sweep, losses, tried=None, **keys):
    """An ablation: arm → final loss by seed, of which None has not ended and a word is a state.

    Args:
        sweep: its folder, which is made
        losses: the first arm is the baseline
        tried: arm → losses at ``RATES`` in the stage ``tune``; None where it was not tuned
        keys: of the plan
    """
    jobs = []
    for arm in losses:
        for rate, loss in zip(RATES, (tried or {}).get(arm, ()), strict=False):
            _add(jobs, sweep, arm, 90, loss, stage="tune", tries={"optimizer.lr": rate})
    for arm, of_seeds in losses.items():
        at = {"stage": "compare", "tries": {"optimizer.lr": 0.06}} if tried else {}
        for seed, each in enumerate(of_seeds):
            _add(jobs, sweep, arm, seed, each, **at)
    arms = [{"name": name, "overrides": [f"arm={name}"], "baseline": i == 0} for i, name in enumerate(losses)]
    plan = {"kind": "ablation", "name": "x", "command": "", "metric": "val/loss", "direction": "minimize"}
    (sweep / "plan.json").write_text(json.dumps({**plan, "jobs": jobs, "arms": arms, "workers": 2, **keys}))
    return sweep


def _add(jobs, sweep, arm, seed, ended, **more):
    job = {"job": len(jobs), "overrides": [f"arm={arm}", f"seed={seed}"], "arm": arm, "seed": seed, "lr": None, **more}
    results = None
    if isinstance(ended, str):
        results = {"status": ended, "reason": "so it is", "metrics": {}}
    elif ended is not None:
        results = completed(ended, fit_seconds=120)
    write_job(sweep, len(jobs), job["overrides"], results)
    jobs.append(job)


def noisy(effects, seeds, sd=0.005, seed=1):
    """Arms with these effects and noise, and a data order that moves all arms of a seed."""
    rng = random.Random(seed)
    order = [rng.gauss(0, 0.05) for _ in range(seeds)]
    return {name: [2 + effect + at + rng.gauss(0, sd) for at in order] for name, effect in effects.items()}
