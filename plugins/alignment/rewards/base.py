"""The contract of ``reward``: how good completions are."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from blockwright.registry import Composable, family

Texts = Sequence[str]
Column = Sequence[Any]  # of the data, one value a completion
Rewards = list[float | None]  # one a completion


@family("reward", root="task")
class Reward(Composable):
    """Judges completions: a pure function, so that a resumed run judges alike. Importing it must not import torch.

    Attributes:
        timeout_s: seconds that one call may take; after them it counts as failed
        bounds: least and greatest value; one outside counts as failed, as one that is not finite does
        together: a value depends on the other completions too. If not, a call that fails is repeated for each
            completion by itself, so that the failure is that of one
    """

    timeout_s: float = 60.0
    bounds: tuple[float, float] = (-math.inf, math.inf)
    together: bool = False

    def __init__(self) -> None: ...  # for rewards without settings

    @abstractmethod
    def __call__(self, prompts: Texts, completions: Texts, **columns: Column) -> Rewards:
        """One reward a completion; None where this function has no opinion, for reasons of the prompt and its columns.

        A completion that cannot be judged is a failure: raise, or give NaN. None would leave this function out of a
        weighted sum, to which a completion must not have the key.

        Args:
            prompts: the last message of each conversation before the completion
            completions: the text of each, without special tokens
            columns: columns of the data, one value a completion; also ``messages``, the conversation before each,
                ``n_tokens``, tokens of each completion with its end, and ``ended``, whether it ended by itself
        """

    def needs(self) -> tuple[str, ...]:
        """Columns that every record of the data must have; a run whose data lack one is refused."""
        return ()

    def parts(self) -> dict[str, tuple[float, Reward]]:
        """The rewards that are judged and logged separately: name → weight, reward."""
        registered: Any = getattr(type(self), "Config", None)
        return {registered.name if registered else type(self).__name__.lower(): (1.0, self)}


def column(columns: Mapping[str, Column], name: str, reward: str) -> Column:
    """A column of the data, which ``reward`` reads.

    Raises:
        KeyError: the data has none of this name
    """
    if name not in columns:
        raise KeyError(f"the reward {reward} reads the column {name!r}; the data has {', '.join(sorted(columns))}")
    return columns[name]
