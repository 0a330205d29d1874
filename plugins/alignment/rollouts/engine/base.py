"""The contract of ``engine``: what samples completions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.alignment.rollouts.record import Rollout
from blockwright.registry import Composable, family


@dataclass(frozen=True)
class Request:
    """What to sample.

    Args:
        prompts: ids of each prompt, at least one
        seeds: of the draws of each completion, which depend on nothing else; the same number for each prompt, in the
            order of the prompts
        new_tokens: of a completion, at most
        sampling: how a token is drawn; without a repetition penalty
        ends: tokens that end a completion
        together: take ``new_tokens`` steps even if all have ended, for ranks that must take equally many
    """

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    new_tokens: int
    sampling: Sampling
    ends: Collection[int]
    together: bool = False

    @property
    def copies(self) -> int:
        """Completions of a prompt."""
        return len(self.seeds) // len(self.prompts)


@family("engine", root="task")
class Engine(Composable):
    """Samples completions from a decoder's present weights."""

    def __init__(self) -> None: ...  # for engines without settings

    @abstractmethod
    def sample(self, decoder: Decoder, request: Request) -> Rollout:
        """Continue prompts until they end.

        Args:
            decoder: in evaluation mode
            request: what to sample
        """
