"""``python -m blockwright_asap``: all of ASAP over several seeds, then the page."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from blockwright import ConfigError
from blockwright_asap import pictures, report, story, study
from blockwright_asap.methods import ABLATIONS, AGAIN, FIXED_POINT, METHODS
from blockwright_asap.study import Settings, Study
from blockwright_asap.world import GAPS

KNOWN = [*METHODS, AGAIN, FIXED_POINT]
GROUPS = {
    "all": [name for name in KNOWN if name not in ABLATIONS],
    "ablations": ["delta_ppo", *ABLATIONS, "simulator", "real"],
}
CORE = "sysid_delta,delta_ppo,delta_dynamics,sysid,sysid_narrow,simulator,real,randomised,fixed_point"


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line."""

    seeds: list[int]
    gaps: list[str]
    methods: list[str]
    tune: int
    iterations: int
    processes: int
    out: Path

    def study(self, gap: str, seed: int) -> Study:
        return Study(self.out / gap / str(seed), Settings(seed, gap, self.iterations))


def main() -> int:
    """Parse the command line and run. Exit code 64: something in it is wrong, and nothing was started."""
    try:
        asked = read(sys.argv[1:])
        for gap, seed in product(asked.gaps, asked.seeds):
            asked.study(gap, seed)
    except ConfigError as error:
        print(f"error: {error.path} = {error.value}\n  rule:   {error.rule}\n  remedy: {error.remedy}", file=sys.stderr)
        return 64
    os.environ["OMP_NUM_THREADS"] = "1"  # of the jobs, which import what reads these
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    start = time.perf_counter()
    with ProcessPoolExecutor(asked.processes, multiprocessing.get_context("spawn")) as pool:
        _run(asked, pool, lambda what: print(f"{time.perf_counter() - start:5.0f} s · {what}", flush=True))
    for gap in asked.gaps:
        print(report.write(asked.out / gap, asked.seeds, asked.tune))
    if len(asked.gaps) > 1:
        print(report.compare(asked.out, asked.gaps, asked.seeds, asked.tune))
    return 0


def read(words: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: a value is not of its kind, or names nothing
    """
    parser = argparse.ArgumentParser(prog="python -m blockwright_asap", description=__doc__.replace("`", ""))
    parser.add_argument("--seeds", default="0,1,2", help="of the studies; default %(default)s")
    parser.add_argument("--gap", default="both", help="parameters, structure, both, or several; default %(default)s")
    parser.add_argument("--methods", default=CORE, help="to compare, or all, or ablations; default %(default)s")
    parser.add_argument("--tune", default="100", help="iterations of PPO in tuning; default %(default)s")
    parser.add_argument("--iterations", default="120", help="of PPO for the policy; default %(default)s")
    parser.add_argument("--processes", default="2", help="jobs at once; default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("logs/asap"), help="folder; default %(default)s")
    given = parser.parse_args(words)
    methods = GROUPS.get(given.methods) or [_named("--methods", word, KNOWN) for word in _split(given.methods)]
    return Request(
        [_whole("--seeds", word, 0) for word in _split(given.seeds)],
        [_named("--gap", word, list(GAPS)) for word in _split(given.gap)],
        methods,
        *(_whole(f"--{name}", getattr(given, name), 1) for name in ("tune", "iterations", "processes")),
        given.out,
    )


def _split(words: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in words.split(",")))


def _named(path: str, word: str, known: Sequence[str]) -> str:
    if word not in known:
        raise ConfigError(path, word, "there is no such name", f"Known: {', '.join(known)}")
    return word


def _whole(path: str, word: str, least: int) -> int:
    if not word.isdigit() or int(word) < least:
        raise ConfigError(path, word, f"must be a whole number from {least}", f"Write {path} {max(least, 2)}")
    return int(word)


def _run(asked: Request, pool: Executor, say: Callable[[str], None]) -> None:
    """Each seed's policy, then what its methods share in each gap, then the methods; all as jobs of the pool."""
    first = asked.gaps[0]
    waiting = {pool.submit(_prepare, asked, first, seed): (first, seed, "") for seed in asked.seeds}
    while waiting:
        for job in wait(waiting, return_when=FIRST_COMPLETED).done:
            gap, seed, method = waiting.pop(job)
            say(f"{gap}, seed {seed}: {method or 'policy, rollouts, identification'}{job.result()}")
            if method:
                continue
            others = [other for other in asked.gaps if other != first] if gap == first else []
            waiting |= {pool.submit(_prepare, asked, other, seed): (other, seed, "") for other in others}
            waiting |= {pool.submit(_measure, asked, gap, seed, name): (gap, seed, name) for name in asked.methods}


def _prepare(asked: Request, gap: str, seed: int) -> str:
    study.limit_threads()
    whole = asked.study(gap, seed)
    if gap != asked.gaps[0]:
        whole.take_policy(asked.study(asked.gaps[0], seed))
    story.prepare(whole, asked.methods)
    return ""


def _measure(asked: Request, gap: str, seed: int, method: str) -> str:
    study.limit_threads()
    whole = asked.study(gap, seed)
    story.measure(whole, method, asked.tune)
    if method != "sysid_delta":
        return ""
    net = story.tuned(whole, method, story.tuning(method, whole), asked.tune)
    return f"; {pictures.film(whole, net, method, whole.folder)}"
