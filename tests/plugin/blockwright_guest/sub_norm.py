from torch.nn import functional as F

from blockwright import Readout, register


@register("readout", "sub_norm")
class SubNorm(Readout):
    """Each head's sum, brought to the length of the token's own value.

    After Wang et al. 2022 (sub-LN), arXiv 2210.06423, which normalises before the output projection: y ← ‖v‖ y / ‖y‖.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, y, v, x):
        length = v.norm(dim=-1, keepdim=True).repeat_interleave(y.shape[2] // v.shape[2], 2)
        return length * F.normalize(y, dim=-1)
