"""Keep values read from the environment out of every file: they may be passwords or keys.

``logger.wandb.api_key=${oc.env:KEY}`` works, and files of the run contain ``${oc.env:KEY}`` in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.registry import ConfigError

PLACES = {"PROJECT_ROOT"}  # variables with a folder, which may be written
SHORTEST = 6  # characters: shorter values are not secrets, and would match unrelated words


def read_from_environment(cfg: DictConfig) -> dict[str, str]:
    """Values that resolving a configuration reads from the environment → their interpolation."""
    taken: dict[str, str] = {}

    def look(name: str, *default: Any) -> Any:
        value = before(name, *default)
        if isinstance(value, str) and len(value) >= SHORTEST and name not in PLACES:
            taken[value] = f"${{oc.env:{name}}}"
        return value

    from omegaconf.resolvers import oc

    before = oc.env
    OmegaConf.register_new_resolver("oc.env", look, replace=True)
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # reported where it matters
        pass
    finally:
        OmegaConf.register_new_resolver("oc.env", before, replace=True)
    return taken


def hidden(value: Any, taken: Mapping[str, str]) -> Any:
    """Plain values with values from the environment replaced by their interpolation."""
    if isinstance(value, Mapping):
        return {key: hidden(inner, taken) for key, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, taken) for inner in value]
    if isinstance(value, str):
        for secret, name in taken.items():
            value = value.replace(secret, name)
    return value


def refuse_in_model(model: Any, taken: Mapping[str, str], path: str = "model") -> None:
    """Refuse values from the environment in a composition, which is stored in every checkpoint.

    Raises:
        ConfigError
    """
    items = model.items() if isinstance(model, Mapping) else enumerate(model) if isinstance(model, list) else ()
    for key, inner in items:
        refuse_in_model(inner, taken, f"{path}.{key}")
    if isinstance(model, str) and (shown := hidden(model, taken)) != model:
        rule = "comes from the environment, but the composition is written to every checkpoint"
        raise ConfigError(path, shown, rule, "Write the value itself, if it is not a secret")
