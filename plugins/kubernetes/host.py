"""Kubernetes as a host of sweeps: lab/sweep/seams.py asks this for jobs that run on a cluster."""

from __future__ import annotations

import functools
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.plugins.kubernetes.cluster import Cluster
from blockwright.plugins.kubernetes.jobs import Jobs
from blockwright.registry import ConfigError

NAME = "cluster"  # of this host, and of what a plan keeps of it


def begin(launcher: Mapping[str, Any]) -> dict[str, Any]:
    """Name a sweep by eight letters, and its cluster and namespace as the launcher's options do."""
    return {"sweep": uuid.uuid4().hex[:8], **{key: launcher.get(key) for key in ("context", "namespace")}}


def jobs_of(sweep: Path, plan: Mapping[str, Any]) -> Jobs:
    """The jobs of a sweep that was started on a cluster.

    Raises:
        ConfigError: another cluster has taken the place of its own
    """
    where = plan[NAME]
    aside = functools.partial(print, file=sys.stderr)  # the output may be JSON
    cluster = Cluster(where["context"], where["namespace"], say=aside)
    check_identity(cluster, where)
    shared = where.get("folder") == str(sweep)  # unknown: killed before it created any
    return Jobs(cluster, where["sweep"], where.get("kind", "job"), sweep, shared=shared)


def check_identity(cluster: Cluster, where: Mapping[str, Any]) -> None:
    """Refuse a cluster that has taken the place of the one where a sweep's jobs were created.

    Raises:
        ConfigError
    """
    found = cluster.identity()["uid"] if where.get("uid") else None
    if found is not None and found != where["uid"]:
        rule = "names another cluster, or the namespace has been recreated, since the jobs of this sweep were created"
        remedy = "Point kubectl at the former one, or name another hydra.sweep.dir"
        raise ConfigError("hydra.launcher.context", where["context"], rule, remedy)
