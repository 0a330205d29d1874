"""Who races: an implementation of a family, and the settings it races at."""

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
    """One of a race.

    Args:
        maker: whose implementation
        family: what of
        model: the library's word for it, of ``MODELS``
        tuned: at its best settings, instead of as it comes (benchmarks/settings.py says which these are)
        compiled: under torch.compile
    """

    maker: Maker
    family: Family
    model: str
    tuned: bool
    compiled: bool = False

    @property
    def name(self) -> str:
        """Without the settings."""
        return f"{self.maker} {self.model}"

    @property
    def settings(self) -> str:
        """In words."""
        return ("best settings" if self.tuned else "as it comes") + (", compiled" if self.compiled else "")

    @property
    def label(self) -> str:
        """What tells it from all others of its race."""
        return f"{self.name}, {self.settings}"


def contenders(family: Family, *, compiled: bool = False, older: bool = False) -> list[Contender]:
    """Every implementation of a family, as it comes and at its best settings.

    Args:
        compiled: adds each at its best settings under torch.compile
        older: adds models that another of the same library supersedes (transformers' DeepSeek-V2)
    """
    found = []
    for (maker, of), models in MODELS.items():
        if of == family:
            for model in models if older else models[:1]:
                found += [Contender(maker, family, model, tuned) for tuned in (True, False)]
                found += [Contender(maker, family, model, True, True)] if compiled else []
    return found
