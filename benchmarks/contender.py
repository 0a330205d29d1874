"""Contenders: an implementation of a model family, with its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.shapes import Family

Maker = Literal["ours", "transformers", "litgpt", "x-transformers"]
MODELS: dict[tuple[Maker, Family], tuple[str, ...]] = {
    ("ours", "mla_moe"): ("MLA + DeepSeekMoE",),
    ("ours", "dense"): ("dense",),
    ("ours", "mixtral"): ("Mixtral-like",),
    ("transformers", "mla_moe"): ("DeepSeek-V3", "DeepSeek-V2"),
    ("transformers", "dense"): ("Llama",),
    ("transformers", "mixtral"): ("Mixtral",),
    ("litgpt", "mla_moe"): ("DeepSeek-V3-like",),
    ("litgpt", "dense"): ("Llama-like",),
    ("litgpt", "mixtral"): ("Mixtral-like",),
    ("x-transformers", "dense"): ("Llama-like",),
}


@dataclass(frozen=True)
class Contender:
    """One contender of a race.

    Args:
        maker: the library
        family: the model family
        model: the library's name for it, one of ``MODELS``
        tuned: with the best settings instead of the defaults (see benchmarks/worker.py)
        compiled: with torch.compile
    """

    maker: Maker
    family: Family
    model: str
    tuned: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        """Name without the settings."""
        return f"{self.maker} {self.model}"

    @property
    def settings(self) -> str:
        """The settings, as text."""
        return ("best settings" if self.tuned else "as it comes") + (", compiled" if self.compiled else "")

    @property
    def label(self) -> str:
        """Unique label within a race."""
        return f"{self.name}, {self.settings}"


def contenders(family: Family, *, compiled: bool = False, older: bool = False) -> list[Contender]:
    """Every implementation of a family, with defaults and with best settings.

    Args:
        compiled: add each with best settings under torch.compile
        older: add models superseded by another of the same library (transformers' DeepSeek-V2)
    """
    found = []
    for (maker, of), models in MODELS.items():
        if of == family:
            for model in models if older else models[:1]:
                found += [Contender(maker, family, model, tuned) for tuned in (True, False)]
                found += [Contender(maker, family, model, True, True)] if compiled else []
    return found
