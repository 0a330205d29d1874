import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright import Scoring, kernel


def narrow(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> bool:
    window = scoring.window
    return window is not None and window <= 64 and k.shape[1] == q.shape[1] and scoring._replace(window=None).plain


@kernel("attention", "band", takes=narrow)
def band_attention(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Attention in a narrow window: each query's own keys are laid beside it, [B,T,K,·,window]."""
    window = scoring.window or 0
    keys, values = (F.pad(t, (0, 0, 0, 0, window - 1, 0)).unfold(1, window, 1) for t in (k, v))
    scores = torch.einsum("btkgh,btkhw->btkgw", q.unflatten(2, (k.shape[2], -1)), keys) * scoring.scale
    before = torch.arange(q.shape[1], device=q.device)[:, None] + torch.arange(1 - window, 1, device=q.device) < 0
    weights = scores.masked_fill(before[:, None, None], float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype)
    return torch.einsum("btkgw,btkvw->btkgv", weights, values).flatten(2, 3)
