"""The configuration of a run from its overrides: conf/ composed, or one error message."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from blockwright.training.configuration.conf import composed
from blockwright.training.configuration.refusals import REFUSALS, explain, is_no_name, refuse_empty


def compose_config(overrides: Sequence[str], *, output_dir: str | None = None) -> DictConfig:
    """The configuration that ``blockwright train OVERRIDES`` would run.

    Args:
        overrides: in Hydra's grammar
        output_dir: value of ``paths.output_dir``, since Hydra has no run directory here

    Raises:
        ConfigError: the overrides cannot be composed
    """
    extra = [f"paths.output_dir={output_dir}"] if output_dir else []
    found = _composed([*extra, *overrides], overrides, with_hydra=False)
    refuse_empty(found, overrides)
    return found


def compose_with_hydra(overrides: Sequence[str]) -> DictConfig:
    """The same with Hydra's own configuration, in ``hydra``; raises as ``compose_config``."""
    return _composed(overrides, overrides, with_hydra=True)


def _composed(overrides: Sequence[str], known: Sequence[str], with_hydra: bool) -> DictConfig:
    try:
        return composed(overrides, with_hydra)
    except REFUSALS as error:
        raise explain(error, known) from None
    except ValueError as error:
        if is_no_name(error):
            raise explain(error, known) from None
        raise
