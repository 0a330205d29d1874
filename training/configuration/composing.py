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
    try:
        found = composed([*extra, *overrides])
    except REFUSALS as error:
        raise explain(error, overrides) from None
    except ValueError as error:
        if is_no_name(error):
            raise explain(error, overrides) from None
        raise
    refuse_empty(found, overrides)
    return found
