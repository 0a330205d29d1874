"""What a configuration has read from the environment stays out of every file: it may be a password or a key.

``logger.wandb.api_key=${oc.env:KEY}`` works, and what is written down of the run says ``${oc.env:KEY}`` in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from registry import ConfigError

PLACES = {"PROJECT_ROOT"}  # variables that hold a folder, which is written down
SHORTEST = 6  # characters: what is shorter is no secret, and would be found in words that have nothing to do with it


def read_from_environment(cfg: DictConfig) -> dict[str, str]:
    """What resolving a configuration takes from the environment: value → what stands in the configuration for it."""
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
    except OmegaConfBaseException:  # told of where it matters
        pass
    finally:
        OmegaConf.register_new_resolver("oc.env", before, replace=True)
    return taken


def hidden(value: Any, taken: Mapping[str, str]) -> Any:
    """Plain values with what was taken from the environment replaced by where it was taken from."""
    if isinstance(value, Mapping):
        return {key: hidden(inner, taken) for key, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, taken) for inner in value]
    if isinstance(value, str):
        for secret, name in taken.items():
            value = value.replace(secret, name)
    return value


def refuse_in_model(model: Any, taken: Mapping[str, str], path: str = "model") -> None:
    """A composition is in every checkpoint, so nothing of the environment may be in it.

    Raises:
        ConfigError
    """
    items = model.items() if isinstance(model, Mapping) else enumerate(model) if isinstance(model, list) else ()
    for key, inner in items:
        refuse_in_model(inner, taken, f"{path}.{key}")
    if isinstance(model, str) and (shown := hidden(model, taken)) != model:
        rule = "comes from the environment, and the composition is written into every checkpoint"
        raise ConfigError(path, shown, rule, "Write the value itself, if it is no secret")
