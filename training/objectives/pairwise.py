"""The objective of reward models: the Bradley-Terry model of preferences, as a function of scores."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor, centre: float = 0.0) -> Tensor:
    """−log σ(chosen − rejected) + centre · (chosen + rejected)², of scores [P]; [P].

    Bradley and Terry 1952; Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, eq. 1. The second term (Eisenstein et
    al. 2023, arXiv 2312.09244) keeps scores around 0, which the first leaves open.
    """
    return -F.logsigmoid(chosen - rejected) + centre * (chosen + rejected).square()
