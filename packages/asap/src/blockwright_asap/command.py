"""``python -m blockwright_asap``: all of ASAP over several seeds, two at a time, then the page."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from blockwright import ConfigError
from blockwright_asap import film, report, story, study
from blockwright_asap.methods import METHODS
from blockwright_asap.study import Settings

CORE = "simulator,sysid_narrow,sysid,delta_dynamics,delta_ppo,sysid_delta,real"


def main() -> int:
    """Parse the command line and run. Exit code 64: something in it is wrong, and nothing was started."""
    parser = argparse.ArgumentParser(prog="python -m blockwright_asap", description=__doc__.replace("`", ""))
    parser.add_argument("--seeds", default="0,1,2", help="of the studies; default %(default)s")
    parser.add_argument("--gap", default="both", help="parameters, structure or both; default %(default)s")
    parser.add_argument("--methods", default=CORE, help="to tune by, or all; default %(default)s")
    parser.add_argument("--tune", type=int, default=100, help="iterations of PPO in tuning; default %(default)s")
    parser.add_argument("--iterations", type=int, default=120, help="of PPO for the policy; default %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="seeds at once; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("logs/asap"), help="folder; default %(default)s")
    given = parser.parse_args()
    try:
        seeds = [_whole("--seeds", word) for word in given.seeds.split(",")]
        methods = list(METHODS) if given.methods == "all" else given.methods.split(",")
        for method in methods:
            if method not in METHODS:
                raise ConfigError("--methods", method, "there is no such method", f"Known: {', '.join(METHODS)}")
        for name in ("tune", "processes"):
            if getattr(given, name) < 1:
                raise ConfigError(f"--{name}", getattr(given, name), "must be above 0", "Write another")
        jobs = [(given.out / given.gap / str(seed), Settings(seed, given.gap, given.iterations)) for seed in seeds]
    except ConfigError as error:
        print(f"error: {error.path} = {error.value}\n  rule:   {error.rule}\n  remedy: {error.remedy}", file=sys.stderr)
        return 64
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(given.processes, multiprocessing.get_context("spawn")) as pool:
        for message in pool.map(_seed, jobs, repeat(methods), repeat(given.tune)):
            print(message, flush=True)
    print(report.write(given.out / given.gap, given.tune))
    return 0


def _whole(path: str, word: str) -> int:
    if not word.strip().isdigit():
        raise ConfigError(path, word, "must be whole numbers", "Write --seeds 0,1,2")
    return int(word)


def _seed(job: tuple[Path, Settings], methods: list[str], tune: int) -> str:
    folder, settings = job
    study.limit_threads()
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"seed {settings.seed} · {time.perf_counter() - start:4.0f} s · {what}", flush=True)

    story.run(folder, settings, methods, tune, say)
    if "sysid_delta" in methods:
        whole = study.Study(folder, settings)
        net = story.tuned(whole, "sysid_delta", story.tuning("sysid_delta", whole), tune)
        say(film.draw(whole, net, "sysid_delta", folder))
    return f"seed {settings.seed} · {time.perf_counter() - start:4.0f} s · {folder}"
