"""What becomes of the sums over values, against slow loops, in each attention that has the seam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from tests.blocks.small import D, Make, drawn, model, near, packed

T, LENGTHS = 13, (7, 6)  # documents of a packed row
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"n_heads": 8, "n_kv_heads": 2},
    "mha": {"n_heads": 4},
    "mqa": {"n_heads": 4},
    "sliding_window": {"n_heads": 8, "n_kv_heads": 2, "window": 3},
    "mla": {"n_heads": 4, "v_head_dim": 7},
    "factorised": {"n_heads": 4},
    "grouped_tied": {"n_heads": 8, "n_kv_heads": 2},
}
SHARING = ["gqa", "mqa", "sliding_window", "factorised", "grouped_tied"]  # two neighbouring heads of the same keys
EXACT = {torch.float64: 1e-11, torch.float32: 2e-5}


GIVEN = Pass(*packed(*LENGTHS, rows=2))


def with_and_without(make_block: Make, name: str, readout: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """An attention with a readout, and the same without: both return what their output projection reads."""
    nodes = ({"name": name, **ATTENTIONS[name], "readout": given} for given in (readout, None))
    block, plain = (make_block("attention", node, around={"position": "rope"}, dtype=dtype) for node in nodes)
    shared = {k: v for k, v in block.state_dict().items() if not k.startswith(("readout", "output"))}
    assert set(plain.load_state_dict(shared, strict=False).missing_keys) == {"output.weight"}
    for made in (block, plain):
        made.output = torch.nn.Identity()
        made.forward = made.mix
    return block, plain


def own_values(name: str, block: Any, x: Tensor) -> Tensor:
    """Values [B,T,K,V] of the tokens, by each attention's own formula."""
    if name == "mla":
        latent = block.kv_norm(block.kv_down(x)[..., : block.latent])
        return (latent @ block.kv_up.weight.T).unflatten(-1, (4, -1))[..., block.nope :]
    weight = block.tied.weight if name == "grouped_tied" else block.value.weight
    return (x @ weight.T).unflatten(-1, (-1, block.head_dim))


def excluded(y: Tensor, v: Tensor) -> Tensor:
    """y − (y·v̂) v̂, one head of one token at a time."""
    z = torch.empty_like(y)
    B, T, N, _ = y.shape
    for b in range(B):
        for t in range(T):
            for n in range(N):
                own = v[b, t, n * v.shape[2] // N]
                z[b, t, n] = y[b, t, n] - y[b, t, n].dot(own) / own.dot(own) * own
    return z


@pytest.mark.parametrize(("name", "dtype"), each(list(ATTENTIONS), list(EXACT)), ids=str)
def test_exclusive_output_is_free_of_the_tokens_own_value(make_block: Make, name: str, dtype: torch.dtype) -> None:
    block, plain = with_and_without(make_block, name, "exclusive", dtype)
    x = drawn(2, T, D, dtype=dtype, seed=1)
    y, v = plain(x, GIVEN), own_values(name, plain, x)
    N = ATTENTIONS[name]["n_heads"]
    right = excluded(y.unflatten(-1, (N, -1)), v).flatten(-2)
    near(block(x, GIVEN), right, EXACT[dtype] * y.abs().max().item())


def test_gradient_of_exclusive_output_is_numerical(make_block: Make) -> None:
    readout = make_block("readout", "exclusive", n_heads=4, n_kv_heads=2, head_dim=5)
    y, v = (torch.randn(1, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    assert torch.autograd.gradcheck(lambda y, v: readout(y, v, None), (y, v))


@pytest.mark.parametrize(("name", "dtype"), each(SHARING, list(EXACT)), ids=str)
def test_difference_is_that_of_neighbouring_heads(make_block: Make, name: str, dtype: torch.dtype) -> None:
    block, plain = with_and_without(make_block, name, "difference", dtype)
    x = drawn(2, T, D, dtype=dtype, seed=1)
    y = plain(x, GIVEN).unflatten(-1, (ATTENTIONS[name]["n_heads"], -1))
    share = 1 / (1 + (-(x @ block.readout.share.weight.T)).exp())
    right = torch.stack([y[:, :, 2 * n] - share[..., n, None] * y[:, :, 2 * n + 1] for n in range(y.shape[2] // 2)], 2)
    near(block(x, GIVEN), right.flatten(-2), EXACT[dtype] * y.abs().max().item())


def test_difference_leaves_half_of_the_heads_to_gate_and_output(make_block: Make) -> None:
    node = {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "readout": "difference", "output_gate": "per_head"}
    block = make_block("attention", node)
    assert block.output.weight.shape == (D, 24) and block.output_gate.project.weight.shape == (4, D)
    decoder: Any = compose(model(readout="exclusive"), device="meta")  # of every attention that takes one
    assert all(type(layer.attention.readout).__name__ == "Exclusive" for layer in decoder.layers)
