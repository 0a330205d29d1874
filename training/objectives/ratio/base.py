"""The contract of ``ratio``: of which probabilities the policy's ratio to the sampling policy is taken."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from blockwright.registry import Composable, family


@family("ratio", root="task")
class Ratio(Composable):
    """The logarithm of the ratio ρ between the policy and the policy that sampled. B completions, T tokens."""

    @abstractmethod
    def __call__(self, logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
        """Log-ratios [B,T], with the gradient of ``logp``.

        Args:
            logp: log-probability of each token under the policy [B,T], with its gradient
            old: the same under the policy that sampled [B,T]
            mask: 1 for tokens of the completion, else 0 [B,T]
        """
