"""Residual streams, their mixing and the value residual against their formulas, and against a single stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.values import ValueResidual
from blockwright.registry import BlockError
from tests.blocks.small import Make, decoder, drawn, ids, near, nothing

TOKENS, D = ids(17), 21  # odd, as are the other sizes
Mixers = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def composed(**changes: Any) -> Any:
    return decoder(torch.float32, n_layers=3, **changes)


@pytest.fixture
def mixers() -> Mixers:
    torch.manual_seed(0)
    a, f = (torch.randn(D, D, dtype=torch.float64) / 4 for _ in range(2))
    return (lambda x: (x @ a).tanh().roll(1, 1)), (lambda x: (x @ f).sin())


@pytest.fixture
def make_streams(make_block: Make) -> Make:
    """A residual block with random parameters, and random streams for it."""

    def make(node: dict[str, Any], **context: Any) -> tuple[Any, Tensor]:
        block = make_block("residual", node, d_model=D, **context)
        if hasattr(block, "mixing"):
            with torch.no_grad():
                block.mixing.reset_parameters()
        return block, drawn(2, 5, block.streams or 3, D, seed=1)

    return make


def matrix(block: Any, logits: Tensor) -> Tensor:
    """[M,M] of the logits of one token, by the papers' words."""
    n, name = block.streams, type(block.mixing).__name__
    if name == "NoMixing":
        return torch.eye(n, dtype=logits.dtype)
    if name == "Permutations":
        weights = logits.softmax(0)
        found = torch.zeros(n, n, dtype=logits.dtype)
        for weight, order in zip(weights, itertools.permutations(range(n)), strict=True):
            for i, j in enumerate(order):
                found[i, j] += weight
        return found
    found = logits.reshape(n, n).softmax(1) + 1e-6
    for step in range(39):
        found = found / (found.sum(step % 2, keepdim=True) + 1e-6)
    return found.T


@pytest.mark.parametrize(("mixing", "n"), [("permutations", 3), ("permutations", 4), ("sinkhorn", 4), ("none", 3)])
def test_mhc_follows_its_formula(make_streams: Make, mixers: Mixers, mixing: str, n: int) -> None:
    block, x = make_streams({"name": "mhc", "n_streams": n, "mixing": mixing})
    want = x.clone()
    pairs = ((block.attention_connection, block.attention_norm), (block.ffn_connection, block.ffn_norm))
    for (connection, norm), mixer in zip(pairs, mixers, strict=True):
        read, write, mixed = torch.zeros(2, 5, D).double(), torch.zeros(2, 5, n).double(), torch.zeros_like(x)
        for b, t in itertools.product(range(2), range(5)):
            vector = want[b, t].flatten()
            found = connection.weight @ (vector / (vector.square().mean() + 1e-6).sqrt())
            sizes = torch.tensor([n, n, len(found) - 2 * n])[: len(connection.scale)]
            scales = connection.scale.repeat_interleave(sizes)
            found = found * scales + connection.bias
            read[b, t] = sum((found[i].sigmoid() + 1e-6) * want[b, t, i] for i in range(n))
            write[b, t] = 2 * found[n : 2 * n].sigmoid()
            mixed[b, t] = matrix(block, found[2 * n :]) @ want[b, t]
        want = write[..., None] * mixer(norm(read))[:, :, None] + mixed
    near(block(x, *mixers, nothing()), want, 1e-10)


def test_read_ahead_reads_by_what_the_block_before_drew(make_streams: Make, mixers: Mixers) -> None:
    """Of two layers, and what closes them; a layer without anything carried reads stream 0."""
    layers = [make_streams({"name": "read_ahead", "n_streams": 3, "mixing": "sinkhorn"})[0] for _ in range(2)]
    found = want = drawn(2, 5, 3, D, seed=1)
    given, read = nothing(), torch.tensor([1.0, 0, 0]).double().expand(2, 5, 3)
    for block in layers:
        found = block(found, *mixers, given)
        pairs = ((block.attention_connection, block.attention_norm), (block.ffn_connection, block.ffn_norm))
        for (connection, norm), mixer in zip(pairs, mixers, strict=True):
            flat = want.flatten(2)
            r = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            a, b, c = (r @ connection.weight.T).split([3, 3, 9], -1)
            (s, t, u), (of_read, of_write, of_mixing) = connection.scale, connection.bias.split([3, 3, 9])
            mixed = torch.stack([
                torch.stack([matrix(block, logits) @ x for logits, x in zip(row, streams, strict=True)])
                for row, streams in zip(u * c + of_mixing, want, strict=True)
            ])  # fmt: skip
            y = mixer(norm(torch.einsum("btm,btmd->btd", read, want)))
            want = 2 * (t * b + of_write).sigmoid()[..., None] * y[:, :, None] + mixed
            read = (s * a + of_read).sigmoid() + 1e-6
        near(found, want, 1e-10)
    near(layers[-1].close(found, given), torch.einsum("btm,btmd->btd", read, want), 1e-10)


def test_permutations_are_doubly_stochastic_at_any_logits(make_streams: Make) -> None:
    block, _ = make_streams({"name": "mhc"})
    found = block.mixing(torch.eye(4, dtype=torch.float64).expand(2, 5, 4, 4), drawn(2, 5, 24) * 30)
    assert found.min() >= 0
    for dim in (-1, -2):
        near(found.sum(dim), torch.ones(2, 5, 4, dtype=torch.float64), 1e-14)


def test_gated_streams_follow_their_formula(make_streams: Make, mixers: Mixers) -> None:
    block, x = make_streams({"name": "gated_streams", "n_streams": 3, "rank": 5}, layer_idx=1, n_layers=2)

    def read(gated: Any, streams: Tensor) -> tuple[Tensor, Tensor]:
        """x [D] and z [M·D] of the streams [M,D] of a token."""
        z = torch.stack([norm(stream) for norm, stream in zip(gated.norms, streams, strict=True)])
        gates = (gated.up.weight @ F.silu(gated.down.weight @ z.flatten() / 3)).sigmoid()
        return (gates.view_as(z) * z).sum(0) / 3, z.flatten()

    want = x.clone()
    pairs = ((block.attention_read, block.attention_write), (block.ffn_read, block.ffn_write))
    for (gated, write), mixer in zip(pairs, mixers, strict=True):
        found = [[read(gated, want[b, t]) for t in range(5)] for b in range(2)]
        h, z = (torch.stack([torch.stack([each[n] for each in row]) for row in found]) for n in range(2))
        want = want + 2 * (z @ write.weight.T / 3).sigmoid()[..., None] * mixer(h)[:, :, None]
    near(block(x, *mixers, nothing()), want, 1e-10)
    last = torch.stack([torch.stack([read(block.closing.read, x[b, t])[0] for t in range(5)]) for b in range(2)])
    near(block.close(x, nothing()), last, 1e-10)


def test_hyper_connections_follow_their_formula(make_streams: Make, mixers: Mixers) -> None:
    block, x = make_streams({"name": "hyper_connections", "n_streams": 3})
    want = x
    pairs = ((block.attention_connection, block.attention_norm), (block.ffn_connection, block.ffn_norm))
    for (connection, norm), mixer in zip(pairs, mixers, strict=True):
        dynamic = (connection.norm(want) @ connection.weight.T).tanh()
        alpha = connection.scale[0] * dynamic[..., :4] + connection.static[:, :4]
        beta = connection.scale[1] * dynamic[..., 4] + connection.static[:, 4]
        both = torch.einsum("btsj,btsd->btjd", alpha, want)  # algorithm 2: the input, then the streams
        want = both[:, :, 1:] + torch.einsum("bts,btd->btsd", beta, mixer(norm(both[:, :, 0])))
    near(block(x, *mixers, nothing()), want, 1e-10)


def aggregate(query: Tensor | None, sources: list[Tensor]) -> Tensor:
    """flash-linear-attention's naive_attnres."""
    v = torch.stack(sources)
    k = torch.nn.functional.rms_norm(v, (v.shape[-1],), eps=1e-6)
    query = torch.zeros(v.shape[-1]).to(v) if query is None else query
    return torch.einsum("lbt,lbtd->btd", torch.einsum("lbtd,d->lbt", k, query).softmax(0), v)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_attention_residual_follows_its_formula(make_streams: Make, mixers: Mixers, size: int) -> None:
    blocks = [make_streams({"name": "attention_residual", "block": size}, n_layers=3, layer_idx=i)[0] for i in range(3)]
    x = drawn(2, 5, D)
    sources, streams = [x], blocks[0].open(x)
    for i, block in enumerate(blocks):
        streams = block(streams, *mixers, nothing())
        queries = ((block.attention_query, block.attention_norm), (block.ffn_query, block.ffn_norm))
        for j, (query, norm) in enumerate(queries):
            y = mixers[j](norm(aggregate(query, sources)))
            sources = [*sources, y] if (2 * i + j) % size == 0 else [*sources[:-1], sources[-1] + y]
    assert streams.shape[2] == 1 + -(-6 // size)
    near(streams, torch.stack(sources, 2), 1e-10)
    near(blocks[-1].close(streams, nothing()), aggregate(blocks[-1].closing_query, sources), 1e-10)
    assert blocks[0].attention_query is None and blocks[1].closing_query is None


@pytest.mark.parametrize(
    ("residual", "bound"),
    [
        ("mhc", 1e-5),
        ({"name": "mhc", "mixing": "sinkhorn", "n_streams": 5}, 3e-5),
        ({"name": "mhc", "mixing": "none", "n_streams": 1}, 1e-5),
        ("hyper_connections", 0),
        ("read_ahead", 1e-5),
        ("attention_residual", 1e-4),
        ({"name": "attention_residual", "block": 4}, 1e-4),
    ],
    ids=str,
)
def test_streams_begin_as_prenorm(residual: Any, bound: float) -> None:
    plain, streams = (composed(mtp={"depth": 2}, residual=r) for r in ("prenorm", residual))
    with torch.no_grad():
        assert (plain(TOKENS) - streams(TOKENS)).abs().max() <= bound
        hidden, targets = plain.hidden(TOKENS)[0], TOKENS.roll(-1, 1)
        both = (d.mtp_nll(hidden, TOKENS, targets)[0] for d in (streams, plain))
        assert all((mine - theirs).abs() <= bound * 30 for (mine, _), (theirs, _) in zip(*both, strict=True))


def test_streams_part_in_training() -> None:
    """What makes streams alike at the start must not keep them alike."""
    for residual in ("mhc", "hyper_connections", "gated_streams", "read_ahead"):
        made, seen = composed(residual=residual).train(), list[Tensor]()
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            made.nll(made.hidden(TOKENS[:, :-1])[0], TOKENS[:, 1:]).div(TOKENS.numel()).backward()
            optimizer.step()
        made.layers[-1].residual.register_forward_hook(lambda module, given, y, seen=seen: seen.append(y))
        made.hidden(TOKENS)
        assert (seen[0] - seen[0].mean(2, keepdim=True)).abs().max() > 1e-3


def test_value_residual_follows_its_formula() -> None:
    blocks, v, factors = [ValueResidual() for _ in range(3)], drawn(3, 2, 5, 3, 7), drawn(3, 2)
    carry: dict[str, Tensor] = {}
    for block, own, values in zip(blocks, factors, v, strict=True):
        block.double().factors.data.copy_(own)
        torch.testing.assert_close(block(values, carry), own[0] * values + own[1] * v[0])


def test_first_layer_with_a_value_residual_leaves_its_values_and_others_need_their_shape() -> None:
    variants = {"attention": {"own": {"name": "mha", "n_heads": 4, "values": None}}}
    layout = {"attention": "own attention*"}
    with torch.no_grad():
        composed(values="value_residual", variants=variants, layout=layout)(TOKENS)
    other = composed(values="value_residual", overrides=[{"layers": 2, "attention": {"n_kv_heads": 1}}])
    with pytest.raises(BlockError, match=r"values of \(1, 12\) with the first layer's, of \(2, 12\)"):
        other(TOKENS)


@pytest.mark.parametrize("name", ["mhc", "hyper_connections"])
def test_streams_open_as_copies_and_close_by_their_mean(make_streams: Make, name: str) -> None:
    block, x = make_streams({"name": name, "n_streams": 3})
    torch.testing.assert_close(block.close(x, nothing()), (x[:, :, 0] + x[:, :, 1] + x[:, :, 2]) / 3)
    assert torch.equal(block.open(x[:, :, 0]), torch.stack([x[:, :, 0]] * 3, 2))


def test_multi_token_prediction_has_sources_of_its_own() -> None:
    made = composed(residual={"name": "attention_residual", "block": 4}, mtp={"depth": 2})
    for residual in (made.layers[0].residual, *(depth.layer.residual for depth in made.mtp)):
        assert residual.attention_query is None and residual.starts == [True, False]
    assert made.layers[1].residual.starts == [False, False] and made.layers[2].residual.starts == [True, False]
