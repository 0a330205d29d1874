"""``hydra/launcher=kubernetes``: jobs of a multirun as jobs of a cluster, with any sweeper.

The task runs in pods, not here: what Hydra gets back is made of what they leave.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from blockwright.blocks.checkpoint.manifest import check_out, whole
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.job import origin
from blockwright.lab.sweep.table import Display
from blockwright.plugins.kubernetes.cluster import Cluster
from blockwright.plugins.kubernetes.host import NAME, check_identity
from blockwright.plugins.kubernetes.jobs import Jobs
from blockwright.plugins.kubernetes.options import Options
from blockwright.plugins.kubernetes.preflight import needs, rehearse, settle
from blockwright.plugins.kubernetes.render import Manifest, render
from blockwright.plugins.kubernetes.wanted import (
    check_names,
    check_options,
    check_overrides,
    check_pruning,
    check_world,
)
from blockwright.registry import ConfigError
from blockwright.registry.folder import write_text
from blockwright.training.configuration.placeholders import read_from_environment
from blockwright.training.jobs import STOP
from blockwright.training.result import SIGNALS, Interrupted, Result

LEAST_GRACE_S = 60
FOLDER = "hydra.sweep.subdir="  # override that numbers a job by its plan (lab/sweep/launcher.py)
SHAPES = ("trainer", "experiment", "debug")  # groups that may change a job's world


def with_grace(options: Options, sweep: Path, say: Callable[[str], object]) -> Options:
    """Derive the grace period from the saves that ended jobs of a sweep have measured; one that is given stays."""
    slowest = max((Result.read(p).save_seconds or 0 for p in sweep.iterdir()), default=0)
    wanted = max(LEAST_GRACE_S, math.ceil(3 * slowest))
    known = f"the slowest save of this sweep took {slowest:.1f} s"
    if slowest and options.grace_s is None:
        say(f"{known}: pods have {wanted} s to end")
        return dataclasses.replace(options, grace_s=wanted)
    if options.grace_s is not None and options.grace_s < 3 * slowest:
        say(f"{known}: hydra.launcher.grace_s={wanted} would be safer than {options.grace_s}")
    return options


class Launch:
    """The launcher behind the plug-in; options as of ``blockwright.plugins.kubernetes.options.Options``."""

    def __init__(self, given: Mapping[str, Any], hydra_context: HydraContext, config: DictConfig) -> None:
        plain: Any = OmegaConf.to_container(OmegaConf.create(dict(given)), resolve=True)
        self.options, self.config, self.context = Options(**plain), config, hydra_context
        self.sweep = Path(config.hydra.sweep.dir).absolute()

    def launch(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
        """Run jobs.

        Args:
            job_overrides: of each
            first: number of the first

        Returns:
            their values, in the order of the jobs; of one that failed the worst

        Raises:
            ConfigError: refused, before anything is created
            Interrupted: this process was stopped
        """
        check_options(self.options)
        if self.options.render is not None:
            check_out(Path(self.options.render))
        given = dict(self._of_pods(first + i, one) for i, one in enumerate(job_overrides))
        read = read_from_environment(self.config.hydra.launcher)
        for overrides in given.values():
            check_overrides(overrides, read)
        more = self._composed(given)
        plan = plans.read(self.sweep)
        if self.options.render is not None:
            made = self._rendered(self.options, plan[NAME]["sweep"], given, more)
            self._write(made, Path(self.options.render))
        with Display(self.sweep, plan, self.options.parallel) as display:
            self._run(plan, given, more, display)
        return [self._returned(plan, number, overrides) for number, overrides in given.items()]

    def _of_pods(self, number: int, overrides: Sequence[str]) -> tuple[int, list[str]]:
        """The number of a job in its plan, and its overrides without those that name files of this machine."""
        number = next((int(o.removeprefix(FOLDER)) for o in overrides if o.startswith(FOLDER)), number)
        start = origin(self.sweep, self._planned.get(number, {"job": number}))[0]
        return number, [o for o in overrides if o not in start and not o.startswith((FOLDER, "ckpt_path="))]

    @functools.cached_property
    def _planned(self) -> dict[int, Mapping[str, Any]]:
        """The jobs of the plan by number; it lists none of a search."""
        return {job["job"]: job for job in plans.read(self.sweep).get("jobs", [])}

    def _start(self, number: int) -> list[str]:
        """The options of a pod for the job that its own starts from, which it finds on the claim."""
        options = {"--after": "after", "--from-step": "from_step"}
        job = self._planned.get(number, {})
        return [word for option, key in options.items() if key in job for word in (option, str(job[key]))]

    def _run(
        self, plan: Mapping[str, Any], given: Mapping[int, list[str]], more: Sequence[str], display: Display
    ) -> None:
        where = plan[NAME]
        name, known = where["sweep"], "kind" in where
        cluster, identity = self._cluster(where, display.say)
        options = dataclasses.replace(self.options, kind=where["kind"]) if known else settle(cluster, self.options)
        options = with_grace(options, self.sweep, display.say)
        made = self._rendered(options, name, given, more)
        folder = self._folder(name)
        jobs = Jobs(cluster, name, options.made_as, self.sweep, folder == str(self.sweep), display.refresh)
        there = jobs.look()[0] if known else {}
        new = [one for n, objects in made.items() if n not in there and not self._ended(n) for one in objects]
        if new:
            needs(cluster, options)
            rehearse(cluster, new)
        if not known:
            made_as = {"kind": options.made_as, "folder": folder}
            plans.write(self.sweep, {**plan, NAME: {**where, **identity, **made_as}})
        with noted() as signals:
            jobs.run(made, options, display.ended, signals)
        if signals or (self.sweep / STOP).exists():
            self._stopped(jobs, signals, made)

    def _cluster(self, where: Mapping[str, Any], say: Callable[[str], object]) -> tuple[Cluster, dict[str, Any]]:
        """The cluster of the sweep, by its plan if jobs of it have been created, and what names it."""
        given = {key: getattr(self.options, key) for key in ("context", "namespace")}
        if "kind" not in where:
            asked = Cluster(**given, say=say)
            identity = asked.identity()
            return dataclasses.replace(asked, context=identity["context"], namespace=identity["namespace"]), identity
        for key, value in given.items():
            if value not in (None, where[key]):
                rule = f"is not where the jobs of this sweep are ({where[key]})"
                raise ConfigError(f"hydra.launcher.{key}", value, rule, "Leave it out, or name another hydra.sweep.dir")
        cluster = Cluster(where["context"], where["namespace"], say=say)
        check_identity(cluster, where)
        return cluster, {}

    def _composed(self, given: Mapping[int, Sequence[str]]) -> list[str]:
        """Compose one job of each world, so that a typo and a wrong world end it here; returns further overrides."""
        more: list[str] = []
        seen = set()
        for overrides in given.values():
            shape = tuple(o for o in overrides if o.lstrip("+~").startswith(SHAPES))
            if shape not in seen:
                seen.add(shape)
                composed = self.context.config_loader.load_sweep_config(self.config, list(overrides))
                check_pruning(composed.get("callbacks") or {})
                trainer = OmegaConf.to_container(composed.trainer, resolve=False)
                more = check_world(self.options, trainer)  # type: ignore[arg-type]
        return more

    def _rendered(
        self, options: Options, name: str, given: Mapping[int, list[str]], more: Sequence[str]
    ) -> dict[int, list[Manifest]]:
        flags = plans.read(self.sweep).get("flags", [])
        task, folder = str(self.config.task_name), self._folder(name)
        made = {
            n: render(options, task, name, n, folder, [*flags, *o, *more], self._start(n)) for n, o in given.items()
        }
        check_names(options, (objects[0]["metadata"]["name"] for objects in made.values()))
        return made

    def _folder(self, name: str) -> str:
        """The sweep's folder as pods see it: this one, if the claim is mounted here as it is there."""
        mount = self.options.mount.rstrip("/")
        here = str(self.sweep).startswith(f"{mount}/") and Path(mount).is_mount()
        return str(self.sweep) if here else f"{mount}/{self.config.task_name}-{name}"

    def _write(self, made: Mapping[int, Sequence[Manifest]], folder: Path) -> None:
        import yaml

        with whole(folder) as written:  # manifests of an earlier command, left there, would be applied with these
            for number, objects in made.items():
                namespace = {"namespace": self.options.namespace} if self.options.namespace else {}
                named = [{**one, "metadata": {**one["metadata"], **namespace}} for one in objects]
                write_text(written / f"{number}.yaml", yaml.safe_dump_all(named, sort_keys=False, width=120))
        print(f"wrote {len(made)} manifests to {folder}; nothing was started")
        sys.exit(0)

    def _ended(self, number: int) -> bool:
        return Result.read(self.sweep / str(number)).ended

    def _stopped(self, jobs: Jobs, signals: Sequence[int], made: Mapping[int, Any]) -> None:
        left = [n for n in made if not self._ended(n)]
        stopped = False
        if signals and self.options.on_stop == "stop":
            try:
                ran, waiting = jobs.stop()
                jobs.cluster.say(f"stopped: {len(ran)} jobs have saved and ended, {len(waiting)} had not started")
                stopped = True
            except ConfigError as error:
                jobs.cluster.say(f"not stopped: {error.rule}")
        if signals and not stopped:
            how = f"blockwright sweep stop {self.sweep}"
            jobs.cluster.say(f"{len(left)} jobs continue in the cluster; to stop them: {how}")
        raise Interrupted(None, 0, signals[0] if signals else signal.SIGTERM, self.sweep)

    def _returned(self, plan: Mapping[str, Any], number: int, overrides: Sequence[str]) -> JobReturn:
        result = Result.read(self.sweep / str(number))
        value = result.metrics.get(plan["metric"])
        worst = -math.inf if plan["direction"] == "maximize" else math.inf
        if result.status not in ("completed", "pruned") or value is None or not math.isfinite(value):
            value = worst
        ended = JobReturn(overrides=filter_overrides(list(overrides)), status=JobStatus.COMPLETED)
        ended.return_value = value
        return ended


@contextmanager
def noted() -> Iterator[list[int]]:
    """Record signals instead of handling them."""
    found: list[int] = []
    before = {s: signal.signal(s, lambda signum, _: found.append(signum)) for s in SIGNALS}
    try:
        yield found
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
