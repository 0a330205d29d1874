"""``hydra/launcher=kubernetes``, or ``blockwright_kubernetes``: jobs of a multirun on a cluster.

Another package's launcher of the first name keeps it. Hydra imports this module at every start, so the launcher proper
is imported only when used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from blockwright.plugins.kubernetes.options import Options


class KubernetesLauncher(Launcher):
    """See plugins/kubernetes/launch.py.

    Args:
        options: those of ``blockwright.plugins.kubernetes.options.Options``
    """

    host = "cluster"

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from blockwright.lab.sweep.application import check_application

        check_application(config, "hydra/launcher", "kubernetes", "another launcher")
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from blockwright.plugins.kubernetes.launch import Launch

        return Launch(self.options, self.hydra_context, self.config).launch(job_overrides, initial_job_idx)


def store(known: ConfigStore) -> None:
    """Register the options with Hydra; what another package stores later replaces ours."""
    known.store("blockwright_kubernetes", Options, group="hydra/launcher", provider="blockwright")
    if not known.repo.get("hydra", {}).get("launcher", {}).get("kubernetes.yaml"):
        known.store("kubernetes", Options, group="hydra/launcher", provider="blockwright")


store(ConfigStore.instance())
