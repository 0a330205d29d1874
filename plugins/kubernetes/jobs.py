"""The jobs of a sweep on a cluster: created once under stable names, watched, and read when they have ended.

Nothing is kept in this process: one that is killed is followed by another, which finds the same jobs by their labels.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blockwright.lab.sweep.job import LOG
from blockwright.plugins.kubernetes import watch
from blockwright.plugins.kubernetes.cluster import Cluster, NoRoom, NotFound, Unreachable
from blockwright.plugins.kubernetes.options import GROUP, Options
from blockwright.plugins.kubernetes.preflight import RESOURCES
from blockwright.plugins.kubernetes.render import Manifest
from blockwright.registry import ConfigError
from blockwright.training.jobs import STOP
from blockwright.training.result import Result, record_failure

TICK_S, LONGEST_S = 1.0, 8.0  # between two looks: at first, and while nothing changes
REFUSED_S = 60  # that refusals may last: a server that comes back denies what it will allow
UNSEEN_S = 5  # without a pod, after which a job's events are asked for
RETRY_S = 30  # between two tries to read a log, at most
SLOW_S = 20  # that a pod may be Pending without a reason, after which its events are asked for
STORAGE = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")  # events of pods that wait for their node


@dataclass
class Jobs:
    """The jobs of one sweep.

    Args:
        cluster: where they run
        sweep: the sweep's name in labels
        kind: ``job``, ``jobset`` or ``trainjob``
        folder: of the sweep, here; results are written to its numbered folders
        shared: whether the pods see the same folder, and so write results and logs themselves
        show: given number, state and start (``time.monotonic()``) of each unfinished job, at each look
    """

    cluster: Cluster
    sweep: str
    kind: str
    folder: Path
    shared: bool = False
    show: Callable[[Sequence[tuple[int, str, float]]], object] = lambda running: None
    _told: dict[str, str] = field(default_factory=dict)
    _stuck: dict[int, float] = field(default_factory=dict)
    _seen: dict[int, float] = field(default_factory=dict)
    _last: dict[int, float] = field(default_factory=dict)
    _again: set[int] = field(default_factory=set)
    _quiet_s: float = 0.0
    _following: set[str] = field(default_factory=set)

    @property
    def selector(self) -> str:
        return f"{GROUP}/sweep={self.sweep}"

    def look(self) -> tuple[dict[int, Manifest], dict[int, list[Manifest]]]:
        """Jobs by number, and pods of each, the oldest first."""
        listed = self.cluster.items(f"{RESOURCES[self.kind]},pods", self.selector)
        pods: dict[int, list[Manifest]] = {}
        made = {watch.number_of(one): one for one in listed if one["kind"] != "Pod"}
        for pod in sorted((o for o in listed if o["kind"] == "Pod"), key=lambda p: p["metadata"]["creationTimestamp"]):
            pods.setdefault(watch.number_of(pod), []).append(pod)
        return made, pods

    def collect(self) -> dict[int, dict[str, str]]:
        """Write the results of jobs that have ended; returns ``running`` or ``waiting``, and why, of the others."""
        made, pods = self.look()
        ended = {number for number, one in made.items() if self._read(number, one, pods.get(number, []))}
        return {number: self._state(one, pods.get(number, [])) for number, one in made.items() if number not in ended}

    def _state(self, one: Manifest, pods: Sequence[Manifest]) -> dict[str, str]:
        at_work = any(pod.get("status", {}).get("phase") == "Running" for pod in pods)
        found = None if watch.is_queued(one) else self._obstacle(one, pods)
        reason = watch.QUEUED if watch.is_queued(one) else watch.blocked(*found) if found else ""
        return {"status": "running" if at_work else "waiting", "reason": reason}

    def _obstacle(self, one: Manifest, pods: Sequence[Manifest]) -> tuple[str, str] | None:
        """What keeps a pod of a job from starting, or from being made."""
        if not pods:
            name = one["metadata"]["name"]
            return self._event((name, f"{name}-node-0"), ("FailedCreate",))
        found = next((each for pod in pods if (each := watch.obstacle(pod))), None)
        return found or next((each for pod in pods if watch.is_pending(pod) and (each := self._slow(pod))), None)

    def _slow(self, pod: Manifest) -> tuple[str, str] | None:
        """What the events of a pod say that is Pending without a reason in its state."""
        metadata = pod["metadata"]
        if time.time() - watch.seconds(metadata["creationTimestamp"]) < SLOW_S:
            return None
        return self._event((metadata["name"],), STORAGE) or ("Pending", f"for more than {SLOW_S} s")

    def _read(self, number: int, one: Manifest, pods: Sequence[Manifest]) -> bool:
        """Write the results of a job if it has ended, and say whether it has."""
        if (end := watch.ending(one)) is None:
            return False
        folder = self.folder / str(number)
        if not Result.read(folder).ended:
            Result.of(watch.results(*end, pods)).write(folder)
        return True

    def run(
        self,
        made: Mapping[int, Sequence[Manifest]],
        options: Options,
        ended: Callable[[int], object],
        signals: Sequence[int],
    ) -> None:
        """Create the jobs that are not there, and wait until all have ended or a signal arrives.

        Args:
            made: the objects of each job
            options: ``parallel`` at a time; given up after ``start_deadline_s``
            ended: called when one has
            signals: received by this process, appended to while this runs

        Raises:
            ConfigError: the cluster has refused for ``REFUSED_S``
        """
        open_jobs = {n for n in made if not Result.read(self.folder / str(n)).ended}
        for number in made.keys() - open_jobs:
            ended(number)
        refused_since = None
        patient, self.cluster = self.cluster, replace(self.cluster, waits=())  # waits between looks, not within calls
        try:
            while open_jobs and not signals and not (self.folder / STOP).exists():
                try:
                    self._round(made, open_jobs, options, ended)
                    refused_since = None
                except Unreachable as away:
                    refused_since = None
                    self._tell("cluster", f"{away.rule}; jobs continue, and this waits for it")
                except NotFound as gone:  # since the look: the next one says what to do
                    self._tell("cluster", watch.shortened(str(gone)))
                except ConfigError as refusal:
                    refused_since = refused_since or time.monotonic()
                    if time.monotonic() - refused_since >= REFUSED_S:
                        raise
                    self._tell("cluster", f"{refusal.rule}; jobs continue, and this asks again for {REFUSED_S} s")
                if open_jobs:
                    self._wait(signals)
        finally:
            self.cluster = patient

    def _round(
        self,
        made: Mapping[int, Sequence[Manifest]],
        open_jobs: set[int],
        options: Options,
        ended: Callable[[int], object],
    ) -> None:
        """Look once: read what has ended, say what has changed, and create what there is room for."""
        found, pods = self.look()
        for number in sorted(open_jobs & found.keys()):
            self._last[number] = time.time()
            if self._read(number, found[number], pods.get(number, [])):
                continue
            if number not in self._seen:
                self.cluster.own(found[number], made[number][1:])  # its creator may have been killed in between
            self._watch(number, found[number], pods.get(number, []), options)
        for number in sorted(self._seen.keys() & (open_jobs - found.keys())):
            if not Result.read(self.folder / str(number)).ended and not self._expired(number, options):
                expired = "" if options.ttl_s is None else f", or {options.ttl_s} s (ttl_s) after its end"
                record_failure(self.folder / str(number), f"deleted from the cluster by another user{expired}")
        for number in sorted(n for n in open_jobs if Result.read(self.folder / str(n)).ended):
            open_jobs.remove(number)
            ended(number)
        room = options.parallel - len(open_jobs & found.keys())
        for number in sorted(open_jobs - found.keys())[: max(0, room)]:
            if not self._create(number, made[number], options):
                break
        self._told.pop("cluster", None)
        self.show([self._row(n, found[n], pods.get(n, [])) for n in sorted(open_jobs & found.keys())])

    def _expired(self, number: int, options: Options) -> bool:
        """Whether a job that is gone may have ended unseen for ``ttl_s``. Made again, its pod finds its results."""
        if options.ttl_s is None or number in self._again or time.time() - self._last[number] < options.ttl_s:
            return False
        self._again.add(number)
        del self._seen[number]
        self.cluster.say(f"job {number}: has gone unseen, as ttl_s={options.ttl_s} allows; it is made again to report")
        return True

    def _create(self, number: int, objects: Sequence[Manifest], options: Options) -> bool:
        """Create a job and what it owns; false while a quota leaves no room for it."""
        name, now = objects[0]["metadata"]["name"], time.time()
        try:
            self.cluster.create(objects[:1])
        except NoRoom as full:
            self._tell(name, f"waits for room: {full.rule}")
            if now - self._stuck.setdefault(number, now) >= options.start_deadline_s:
                record_failure(self.folder / str(number), f"given up after {options.start_deadline_s} s: {full.rule}")
            return False
        self.cluster.own(objects[0], objects[1:])
        self._stuck.pop(number, None)
        self.cluster.say(f"job {number}: {name} is created")
        self._seen[number] = self._last[number] = now
        self._quiet_s = 0.0
        return True

    def _row(self, number: int, one: Manifest, pods: Sequence[Manifest]) -> tuple[int, str, float]:
        """Of a live table: number, what was last said of the job, and since when this process has seen it."""
        names = [*(pod["metadata"]["name"] for pod in pods), one["metadata"]["name"]]  # what holds it back last
        said = [self._told[name] for name in names if name in self._told]
        age = time.time() - self._seen.get(number, time.time())
        return number, said[-1] if said else "waiting", time.monotonic() - age

    def _wait(self, signals: Sequence[int]) -> None:
        self._quiet_s = min(LONGEST_S, max(TICK_S, self._quiet_s * 1.5))
        until = time.monotonic() + self._quiet_s
        while time.monotonic() < until and not signals:
            time.sleep(min(0.1, TICK_S))

    def _watch(self, number: int, one: Manifest, pods: Sequence[Manifest], options: Options) -> None:
        """Say what has changed, and give a job up that has not started for too long."""
        now = time.time()
        if number not in self._seen:
            self._seen[number] = now
            self.cluster.say(f"job {number}: {one['metadata']['name']} is there")
        for pod in pods:
            self._tell(pod["metadata"]["name"], watch.line(pod, now))
            if not self.shared and pod.get("status", {}).get("phase") == "Running" and watch.is_first(pod):
                self._follow(pod["metadata"]["name"], number)
        obstacle = None
        if watch.is_queued(one):
            self._tell(one["metadata"]["name"], watch.QUEUED)
            self._seen[number] = now
        elif pods or now - self._seen[number] >= UNSEEN_S:
            obstacle = self._obstacle(one, pods)
            if obstacle and not any(map(watch.obstacle, pods)):  # else the line of a pod says it
                self._tell(one["metadata"]["name"], watch.blocked(*obstacle))
        if obstacle is None:
            self._stuck.pop(number, None)
            if not watch.is_queued(one):
                self._told.pop(one["metadata"]["name"], None)
            return
        since = self._stuck.setdefault(number, now)
        if now - since >= options.start_deadline_s:
            why = watch.blocked(*obstacle)
            self.cluster.delete(RESOURCES[self.kind], [one["metadata"]["name"]])
            record_failure(self.folder / str(number), f"given up after {options.start_deadline_s} s: {why}")

    def _event(self, owners: Sequence[str], reasons: Sequence[str]) -> tuple[str, str] | None:
        """Reason and message of the last warning about one of some objects."""
        for owner in owners:
            selector = f"involvedObject.name={owner},type=Warning"
            with suppress(ConfigError):
                events = self.cluster.get("events", "--field-selector", selector)["items"]
                for event in reversed([e for e in events if e.get("reason") in reasons]):
                    return event["reason"], str(event.get("message", ""))
        return None

    def _tell(self, name: str, state: str) -> None:
        if self._told.get(name) != state:
            self._told[name], self._quiet_s = state, 0.0
            self.cluster.say(f"  {name}: {state}")

    def _follow(self, pod: str, number: int) -> None:
        """Copy the log of a pod to the job's folder, in a thread."""
        if pod not in self._following:
            self._following.add(pod)
            file = self.folder / str(number) / LOG
            threading.Thread(target=follow, args=(self.cluster, pod, file), daemon=True).start()

    def stop(self, numbers: Collection[int] | None = None) -> tuple[list[int], list[int]]:
        """Read the jobs that have ended, and delete the others, whose pods save first.

        Waits until they are gone, and says what it waits for. Pods of a node that does not answer are left.

        Args:
            numbers: of jobs to delete even if they have ended; None for those that have not

        Returns:
            the deleted ones whose pods ran, and which so have saved; and those that had not started
        """
        made, pods = self.look()
        for number, one in made.items():
            if numbers is None:
                self._read(number, one, pods.get(number, []))
        chosen = [n for n, one in made.items() if (watch.ending(one) is None if numbers is None else n in numbers)]
        self.cluster.delete(RESOURCES[self.kind], [made[n]["metadata"]["name"] for n in chosen])
        ran = [n for n in chosen if any(not watch.is_pending(pod) for pod in pods.get(n, []))]
        left = self._gone(set(chosen))
        return [n for n in ran if n not in left], [n for n in chosen if n not in (*ran, *left)]

    def _gone(self, chosen: set[int]) -> set[int]:
        """Wait until jobs are gone; returns those that stay because a node does not answer."""
        while True:
            made, pods = self.look()
            left, now = chosen & made.keys(), time.time()
            shown = [pod for n in sorted(left) for pod in pods.get(n, [])]
            for pod in shown:
                self._tell(pod["metadata"]["name"], watch.line(pod, now))
            alive = [pod for pod in shown if watch.terminated(pod) is None]
            if not left or (alive and all(watch.is_lost(pod, now) for pod in alive)):
                for n in sorted(left):
                    self.cluster.say(
                        f"job {n}: {made[n]['metadata']['name']} is left until its node is back or tainted"
                    )
                return left
            self._wait([])


def follow(cluster: Cluster, pod: str, file: Path, pause_s: float = 1.0) -> None:
    """Copy a pod's log to a file until the pod is gone. A stream breaks after hours or silence, and then continues.

    Args:
        cluster: of the pod
        pod: its name
        file: appended to
        pause_s: seconds before a broken stream is opened again; twice as long each time that it says nothing
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    last, at_last = "", 0  # time of the last line, and how many lines had it
    ended, wait_s = False, pause_s
    while True:
        since = [f"--since-time={last}"] if last else []
        command = cluster.command("logs", "--follow", "--timestamps", pod, *since)
        with _opened(command) as process, file.open("ab") as log:
            assert process.stdout and process.stderr
            again, skipped, grew = at_last, 0, False
            for line in process.stdout:
                stamp, _, rest = line.partition(b" ")
                when = stamp.decode(errors="replace")
                if when < last or (when == last and skipped < again):
                    skipped += when == last
                    continue
                at_last = at_last + 1 if when == last else 1
                last, grew = when, True
                log.write(rest)
                log.flush()
            error = process.stderr.read().decode(errors="replace")
            code = process.wait()
        if (ended and not grew) or "NotFound" in error:
            return
        if code == 0:  # the container has ended, or the stream broke
            with suppress(Exception):
                ended = watch.terminated(cluster.get("pod", pod)) is not None
        time.sleep(wait_s)
        wait_s = pause_s if grew else min(RETRY_S, 2 * wait_s)


@contextmanager
def _opened(command: Sequence[str]) -> Any:
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        with process:
            yield process
    finally:
        process.kill()
