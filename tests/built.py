"""Tasks and data modules built by name, as a run builds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from blockwright import registry
from blockwright.blocks.checkpoint.shards import ready, write_shards
from blockwright.blocks.decoder import Decoder
from blockwright.training.configuration import parts


def task(
    name: str,
    model: Mapping[str, Any],
    optimizer: Any,
    scheduler: Any,
    seed: int = 0,
    init_from: str | None = None,
    starts: Sequence[Any] = (),
    **settings: Any,
) -> Any:
    """A task of a run, whose own settings are ``settings``."""
    of_the_run = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seed": seed}
    of_the_run["starts"] = [*parts.starts({"init_from": init_from}), *starts]
    return parts.build("task", {"task": {"name": name, **settings}, **of_the_run})


def data(name: str, model: Mapping[str, Any] | None = None, **settings: Any) -> Any:
    """A data module of a run, whose model only pictures need."""
    return parts.build("data", {"data": {"name": name, **settings}, "model": model})


def names(kind: str, package: str) -> list[str]:
    """The names of a kind that the modules of a package register: of the core, or of a plug-in."""
    registered = {name: registry.lookup(kind, name).cls.__module__ for name in registry.names(kind)}
    return [name for name, module in registered.items() if module.startswith(f"{package}.")]


def imported(decoder: Decoder, folder: Path) -> Path:
    """Write a folder of the form that imports have: a composition and its weights."""
    folder.mkdir(parents=True)
    (folder / "model.yaml").write_text(yaml.safe_dump(decoder.config))
    write_shards(folder, {name: ready(tensor) for name, tensor in decoder.state_dict().items()}, 2**30)
    return folder
