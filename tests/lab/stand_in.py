"""A stand-in for train.py that takes no time, and plans of jobs for it."""

import json
import time

from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.table import rows_of

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(a.lstrip("+").split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = Path(given["hydra.run.dir"].strip("'"))
with open(folder / "calls", "a") as file:
    environment = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "RANK")}
    print(json.dumps({"argv": sys.argv[1:], "cwd": os.getcwd(), "at": time.time(), **environment}), file=file)
do = given["do"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("hello", flush=True)
if do == "wait" and "ckpt_path" not in given and not (folder.parent / "go").exists():
    (folder / "waits").touch()
    while not (folder.parent / "go").exists():
        time.sleep(0.02)
if do == "refuse":
    print("error: model.x = 7\\n  rule:   must divide y (64)\\n  remedy: Write 8", file=sys.stderr)
    sys.exit(64)
if do == "diverge":
    print("error: diverged at step 2: its loss is nan", file=sys.stderr)
    sys.exit(70)
if do == "crash":
    raise RuntimeError("it broke\\nin two lines")
if do == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if do == "silent":
    sys.exit(3)
if do != "bare":
    results = {"status": "completed", "metrics": {"val/loss": float(given["loss"])}}
    (folder / "results.json").write_text(json.dumps(results))
"""


def make_plan(sweep, *jobs, **more):
    listed = [{"job": i, "overrides": ["seed=1", *job.split()]} for i, job in enumerate(jobs)]
    plan = {"kind": "grid", "name": "x", "command": "c", "metric": "val/loss", "direction": "minimize", "workers": 2}
    plans.write(sweep, {**plan, "jobs": listed, **more})
    return sweep


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def calls(job):
    return [json.loads(line) for line in (job / "calls").read_text().splitlines()]


def statuses(sweep):
    return [row["status"] for row in rows_of(sweep)]
