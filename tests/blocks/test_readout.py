"""What becomes of the sums over values, against slow loops, in each attention that has the seam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError

T, D, LENGTHS = 13, 48, (7, 6)  # documents of a packed row
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


def packed() -> Pass:
    segments = torch.repeat_interleave(torch.arange(2), torch.tensor(LENGTHS))[None].expand(2, -1)
    return Pass(torch.cat([torch.arange(n) for n in LENGTHS])[None], segments)


def with_and_without(make_block: Callable[..., Any], name: str, readout: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """An attention with a readout, and the same without: both return what their output projection reads."""
    nodes = ({"name": name, **ATTENTIONS[name], "readout": given} for given in (readout, None))
    block, plain = (make_block("attention", node, around={"position": "rope"}, dtype=dtype) for node in nodes)
    shared = {k: v for k, v in block.state_dict().items() if not k.startswith(("readout", "output"))}
    assert set(plain.load_state_dict(shared, strict=False).missing_keys) == {"output.weight"}
    for each in (block, plain):
        each.output = torch.nn.Identity()
        each.forward = each.mix
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


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_exclusive_output_is_free_of_the_tokens_own_value(
    make_block: Callable[..., Any], name: str, dtype: torch.dtype
) -> None:
    block, plain = with_and_without(make_block, name, "exclusive", dtype)
    x = torch.randn(2, T, D, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y, v = plain(x, packed()), own_values(name, plain, x)
    N = ATTENTIONS[name]["n_heads"]
    right = excluded(y.unflatten(-1, (N, -1)), v).flatten(-2)
    torch.testing.assert_close(block(x, packed()), right, rtol=0, atol=EXACT[dtype] * y.abs().max().item())


def test_gradient_of_exclusive_output_is_numerical(make_block: Callable[..., Any]) -> None:
    readout = make_block("readout", "exclusive", n_heads=4, n_kv_heads=2, head_dim=5)
    y, v = (torch.randn(1, 3, n, 5, dtype=torch.float64, requires_grad=True) for n in (4, 2))
    assert torch.autograd.gradcheck(lambda y, v: readout(y, v, None), (y, v))


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", SHARING)
def test_difference_is_that_of_neighbouring_heads(
    make_block: Callable[..., Any], name: str, dtype: torch.dtype
) -> None:
    block, plain = with_and_without(make_block, name, "difference", dtype)
    x = torch.randn(2, T, D, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y = plain(x, packed()).unflatten(-1, (ATTENTIONS[name]["n_heads"], -1))
    share = 1 / (1 + (-(x @ block.readout.share.weight.T)).exp())
    right = torch.stack([y[:, :, 2 * n] - share[..., n, None] * y[:, :, 2 * n + 1] for n in range(y.shape[2] // 2)], 2)
    torch.testing.assert_close(block(x, packed()), right.flatten(-2), rtol=0, atol=EXACT[dtype] * y.abs().max().item())


def test_difference_leaves_half_of_the_heads_to_gate_and_output(make_block: Callable[..., Any]) -> None:
    node = {"name": "gqa", "n_heads": 8, "n_kv_heads": 2, "readout": "difference", "output_gate": "per_head"}
    block = make_block("attention", node)
    assert block.output.weight.shape == (D, 24) and block.output_gate.project.weight.shape == (4, D)


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ({"name": "mha", "n_heads": 4, "readout": "difference"}, "model.attention.readout"),
        ({"name": "gqa", "n_heads": 6, "n_kv_heads": 2, "readout": "difference"}, "model.attention.readout"),
        ({"name": "mla", "n_heads": 4, "readout": "difference"}, "model.attention.readout"),
        ({"name": "gqa", "readout": "exclusiv"}, "model.attention.readout.name"),
        ({"name": "gqa", "readout": {"name": "exclusive", "strength": 2}}, "model.attention.readout.strength"),
        ({"name": "gated_delta", "readout": "exclusive"}, "model.attention.readout"),
        ("exclusive", "model.attention.name"),
    ],
    ids=str,
)
def test_readout_that_cannot_be_is_refused(tiny: Callable[..., dict[str, Any]], node: Any, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(tiny(attention=node), device="meta")
    assert caught.value.path == path and caught.value.rule and caught.value.remedy


def test_readout_of_the_model_is_that_of_every_attention_that_takes_one(tiny: Callable[..., dict[str, Any]]) -> None:
    decoder: Any = compose({**tiny(attention={"name": "gqa", "n_heads": 4}), "readout": "exclusive"}, device="meta")
    assert all(type(layer.attention.readout).__name__ == "Exclusive" for layer in decoder.layers)
