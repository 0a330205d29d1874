"""Residual streams against transformers' DeepSeek-V4, whose layers have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

from blockwright.blocks.forward_pass import Pass

D = 35


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("n", [3, 4])
def test_mhc_is_that_of_deepseek_v4(
    make_block: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype, bound: float
) -> None:
    node = {"name": "mhc", "n_streams": n, "mixing": "sinkhorn"}
    ours = make_block("residual", node, d_model=D, dtype=dtype, around={"norm": "rmsnorm"})
    theirs = DeepseekV4HyperConnection(DeepseekV4Config(hidden_size=D, hc_mult=n)).to(dtype)
    if dtype == torch.float64:
        monkeypatch.setattr(Tensor, "float", Tensor.double)  # it computes in single precision whatever the model's
    torch.manual_seed(0)
    x, project = torch.randn(2, 11, n, D, dtype=dtype), torch.randn(D, D, dtype=dtype) / 6

    def mixer(h: Tensor) -> Tensor:
        return (h @ project).sin()

    want = x
    for connection, norm in ((ours.attention_connection, ours.attention_norm), (ours.ffn_connection, ours.ffn_norm)):
        theirs.load_state_dict({"fn": connection.weight, "base": connection.bias, "scale": connection.scale})
        post, comb, collapsed = theirs(want)
        want = post[..., None] * mixer(norm(collapsed))[:, :, None] + comb.mT @ want  # DeepseekV4DecoderLayer
    torch.testing.assert_close(ours(x, mixer, mixer, Pass(torch.arange(11)[None])), want, rtol=0, atol=bound)
