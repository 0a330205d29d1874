"""An engine that takes a Hugging Face folder and a run configuration, and what it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from blockwright.plugins.planner.handover.training import Training
from blockwright.registry import ConfigError


@dataclass(frozen=True)
class Takes:
    """What an engine can do with a model_type, in values of ``lab.plan.search.CHOICES``; all others are free."""

    sizes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Engine:
    """One engine.

    Args:
        title: its name
        file: of the run configuration
        families: model_type → the sizes it is limited to
        write: the run configuration of a training
    """

    title: str
    file: str
    families: Mapping[str, Takes]
    write: Callable[[Training, str], dict[str, Any]]

    def sizes(self, model_type: str, chosen: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Any, ...]]:
        """The sizes to search over: those that the user chose, within those that it takes.

        Raises:
            ConfigError: it has no such model, or takes none of the chosen values of a size
        """
        if model_type not in self.families:
            rule = f"{self.title} has no model of this model_type"
            raise ConfigError("--to", f"{self.title} with {model_type!r}", rule, f"It has {', '.join(self.families)}")
        found = {key: tuple(values) for key, values in chosen.items()}
        for key, taken in self.families[model_type].sizes.items():
            left = tuple(v for v in found.get(key, taken) if v in taken)
            if not left:
                rule = f"{self.title} does not do this with {model_type}"
                values = ",".join(map(str, found[key]))
                raise ConfigError(
                    key, values, rule, f"Write {key}={','.join(map(str, taken)).lower()}, or leave it out"
                )
            found[key] = left
        return found

    def text(self, training: Training, model_type: str) -> str:
        """The file, with a line that says what it is."""
        layout = f"{training.job.gpus:,} GPUs, {training.layout}"
        head = (
            f"# A run configuration for {self.title}: {layout}. ??? is to be filled in. Not yet run with that engine.\n"
        )
        return head + OmegaConf.to_yaml(OmegaConf.create(self.write(training, model_type)))
