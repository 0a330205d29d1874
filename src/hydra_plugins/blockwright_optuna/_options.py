"""The typed options of ``hydra/sweeper=optuna``, or ``blockwright_optuna``, and ``hydra/sweeper/sampler=NAME``.

The package hydra-optuna-sweeper has the names ``optuna`` and those of samplers too. Where it is installed they are its
own, and its samplers serve this search as well.

Hydra executes every module of a plug-in without a leading underscore without importing it, which breaks dataclasses.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Sampler:
    """Any sampler of Optuna, by its class."""

    _target_: str = MISSING


@dataclass
class TPE(Sampler):
    _target_: str = "optuna.samplers.TPESampler"
    seed: int | None = None
    n_startup_trials: int = 10
    n_ei_candidates: int = 24
    multivariate: bool = False
    group: bool = False
    constant_liar: bool = False


@dataclass
class Random(Sampler):
    _target_: str = "optuna.samplers.RandomSampler"
    seed: int | None = None


@dataclass
class QMC(Sampler):
    _target_: str = "optuna.samplers.QMCSampler"
    seed: int | None = None
    qmc_type: str = "sobol"
    scramble: bool = False


@dataclass
class CmaEs(Sampler):
    _target_: str = "optuna.samplers.CmaEsSampler"
    seed: int | None = None
    x0: dict[str, Any] | None = None
    sigma0: float | None = None
    n_startup_trials: int = 1


@dataclass
class NSGAII(Sampler):
    _target_: str = "optuna.samplers.NSGAIISampler"
    seed: int | None = None
    population_size: int = 50
    mutation_prob: float | None = None
    crossover_prob: float = 0.9
    swapping_prob: float = 0.5


@dataclass
class Grid(Sampler):
    """Every combination once; the search supplies the choices."""

    _target_: str = "optuna.samplers.GridSampler"
    _partial_: bool = True
    seed: int | None = None


SAMPLERS = {"tpe": TPE, "random": Random, "qmc": QMC, "cmaes": CmaEs, "nsgaii": NSGAII, "grid": Grid}


@dataclass
class OptunaSweeper:
    """A search.

    Args:
        sampler: which parameters to try next
        direction: ``minimize`` or ``maximize``, of an ``optimized_metric`` that no task and no callback declares; else
            null, and it follows from the figure
        storage: URL of a database for the study; null for ``study.db`` in the sweep's folder
        study_name: null for one made of the task's name and the sweep's folder
        n_trials: trials in all
        n_jobs: parallel trials
        params: override → search space: ``choice(a, b)``, ``interval(0, 1)``, ``range(1, 9)`` or
            ``tag(log, interval(1e-4, 1e-2))``
    """

    _target_: str = "hydra_plugins.blockwright_optuna.sweeper.ResumableOptunaSweeper"
    _recursive_: bool = False  # the sampler's class is looked for after the sweeper has seen that Optuna is there
    defaults: list[Any] = field(default_factory=lambda: [{"sampler": "tpe"}])
    sampler: Any = MISSING  # a Sampler, or a node of hydra-optuna-sweeper
    direction: Any = None
    storage: str | None = None
    study_name: str | None = None
    n_trials: int = 20
    n_jobs: int = 1
    params: dict[str, str] | None = None


def store() -> None:
    """Register the options with Hydra."""
    known = ConfigStore.instance()
    known.store("blockwright_optuna", OptunaSweeper, group="hydra/sweeper", provider="blockwright")
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is not None:
        return
    known.store("optuna", OptunaSweeper, group="hydra/sweeper", provider="blockwright")
    for name, node in SAMPLERS.items():
        known.store(name, node, group="hydra/sweeper/sampler", provider="blockwright")
