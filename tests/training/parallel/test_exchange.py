"""DeepEP's exchange computes what torch's does, over an imitation of the library's buffer with its signatures."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from many_ranks import spawn
from torch import Tensor

from blockwright.registry import ConfigError
from blockwright.training.parallel.collectives import exchange, exchange_counts
from blockwright.training.parallel.exchange import deep_ep
from blockwright.training.parallel.exchange.all_to_all import AllToAll
from blockwright.training.parallel.exchange.base import Exchange
from blockwright.training.parallel.exchange.lookup import check_exchange

RANKS, HELD, TOKENS, CHOSEN, WIDTH = 2, 3, 7, 2, 4

# Parameters of deep_ep.Buffer, version 2.1 (deep_ep/buffers/legacy.py).
OF_DISPATCH = {
    *("x", "handle", "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert"),
    *("topk_idx", "topk_weights", "expert_alignment", "num_worst_tokens", "config", "previous_event", "async_finish"),
    "allocate_on_comm_stream",
}
OF_COMBINE = {
    *("x", "handle", "topk_weights", "bias", "config", "previous_event", "async_finish", "allocate_on_comm_stream")
}


class Hint:
    """Of the library's ``Config``."""

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Buffer:
    """The library's buffer by gloo: what its documentation says of each call, and nothing that it does not."""

    made: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, group: Any, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        self.made.append((num_nvl_bytes, num_rdma_bytes))

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Hint:
        return Hint()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64 and int(topk_idx.min()) >= -1
        a_rank = num_experts // self.ranks
        owner = torch.where(topk_idx < 0, self.ranks, topk_idx // a_rank)
        reached = torch.zeros(len(topk_idx), self.ranks + 1, dtype=torch.bool).scatter_(1, owner, True)[:, : self.ranks]
        an_expert = torch.bincount(topk_idx[topk_idx >= 0].flatten(), minlength=num_experts)
        return reached.sum(0).int(), None, an_expert.int(), reached, None

    def dispatch(self, x: Tensor, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and given.keys() <= OF_DISPATCH
        if handle is not None:
            assert not given
            sent, received, token, _ = handle
            return exchange(received, sent, self.group, x[token])[0], None, None, None, None, None
        asked, weights, reached = given["topk_idx"], given["topk_weights"], given["is_token_in_rank"]
        assert weights.dtype == torch.float32
        torch.testing.assert_close(reached.sum(0).int(), given["num_tokens_per_rank"])
        sent = reached.sum(0).tolist()
        received = exchange_counts(torch.tensor(sent), self.group).tolist()
        to, token = reached.t().nonzero(as_tuple=True)
        held = len(given["num_tokens_per_expert"]) // self.ranks
        numbers = asked[token] - to[:, None] * held
        absent = (asked[token] < 0) | (numbers < 0) | (numbers >= held)
        numbers, weights = numbers.masked_fill(absent, -1), weights[token].masked_fill(absent, 0)
        rows, numbers, weights = exchange(received, sent, self.group, x[token], numbers, weights)
        counts = torch.bincount(numbers[numbers >= 0].flatten(), minlength=held).tolist()
        return rows, numbers, weights, counts, (sent, received, token, len(x)), None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        sent, received, token, n = handle
        (back,) = exchange(sent, received, self.group, x)
        found = torch.zeros(n, x.shape[1]).index_add_(0, token, back.float()).to(x.dtype)
        if topk_weights is None:
            return found, None, None
        (shares,) = exchange(sent, received, self.group, topk_weights)
        return found, torch.zeros(n, shares.shape[1]).index_add_(0, token, shares), None


def test_the_imitation_takes_what_the_library_takes() -> None:
    for call, known in ((Buffer.dispatch, OF_DISPATCH), (Buffer.combine, OF_COMBINE)):
        named = {p.name for p in inspect.signature(call).parameters.values() if p.kind is not p.VAR_KEYWORD}
        assert named - {"self"} <= known


def run(how: type[Exchange], x: Tensor, asked: Tensor, weights: Tensor) -> Mapping[str, Tensor]:
    """Each expert e multiplies by e + 1; results and gradients."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    sent = how(dist.group.WORLD, RANKS, HELD)  # type: ignore[arg-type]
    rank = torch.where(asked < 0, RANKS, asked // HELD)
    rows, experts, shares, pairs, handle = sent.send(x, rank, asked % HELD, weights)
    assert pairs == int((experts < HELD).sum())
    factors = (1 + dist.get_rank() * HELD + torch.arange(HELD + 1)).float()
    factors[HELD] = 0
    scaled = (shares * factors[experts]).sum(1, keepdim=True) * rows
    y = sent.give_back(scaled, handle)
    (y.float() * torch.arange(1, y.numel() + 1).view_as(y)).sum().backward()
    assert x.grad is not None and weights.grad is not None
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad}


def both_ways(nothing: bool) -> list[Mapping[str, Tensor]]:
    sys.modules["deep_ep"] = module = types.ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randint(-4, 5, (TOKENS, WIDTH), generator=generator).float()  # exact in bfloat16
    asked = torch.stack([torch.randperm(RANKS * HELD, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    asked[0], asked[1, 1] = -1, -1  # tokens with no expert, and with one
    if nothing:
        asked = torch.where(asked >= HELD, -1, asked)  # the last rank receives nothing
    weights = torch.randint(1, 4, (TOKENS, CHOSEN), generator=generator).float() / 4
    found = [run(how, x, asked, weights.masked_fill(asked < 0, 0)) for how in (AllToAll, deep_ep.DeepEP)]
    again = deep_ep.buffer_of(dist.group.WORLD, WIDTH * 2)  # type: ignore[arg-type]
    assert isinstance(again, Buffer) and Buffer.made == [(WIDTH * 2 * RANKS, 0)]  # one buffer for all layers
    return found


@pytest.mark.parametrize("nothing", [False, True])
def test_both_exchanges_give_the_same_sums_and_gradients(nothing: bool) -> None:
    for torchs, theirs in spawn(RANKS, both_ways, nothing):
        for name in torchs:
            torch.testing.assert_close(theirs[name], torchs[name], rtol=2e-2, atol=1e-6)  # they send bfloat16


@pytest.mark.parametrize(("name", "rule"), [("deep_eep", "no such exchange"), ("deep_ep", "deep_ep is not installed")])
def test_an_exchange_that_is_not_there_is_refused(name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check_exchange(name)
