"""Tokens that the experts of ranks exchange: by DeepEP as by torch, few where routing is limited, with one wait."""

from __future__ import annotations

import sys
import types
from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from counting import FirstStep
from many_ranks import DEEPSEEK, MOE, read_model, spawn, train
from torch import Tensor

from blockwright.registry import ConfigError
from blockwright.training.parallel.collectives import exchange, exchange_counts
from blockwright.training.parallel.exchange import AllToAll, DeepEP, Exchange, buffer_of
from blockwright.training.parallel.sizes import check_exchange

RANKS, HELD, TOKENS, CHOSEN, WIDTH = 2, 3, 7, 2, 4

# Parameters of deep_ep.Buffer, version 2.1 (deep_ep/buffers/legacy.py).
OF_DISPATCH = {
    *("x", "handle", "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert"),
    *("topk_idx", "topk_weights", "expert_alignment", "num_worst_tokens", "config", "previous_event", "async_finish"),
    "allocate_on_comm_stream",
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
    found = [run(how, x, asked, weights.masked_fill(asked < 0, 0)) for how in (AllToAll, DeepEP)]
    again = buffer_of(dist.group.WORLD, WIDTH * 2)  # type: ignore[arg-type]
    assert isinstance(again, Buffer) and Buffer.made == [(WIDTH * 2 * RANKS, 0)]  # one buffer for all layers
    return found


@pytest.mark.parametrize("nothing", [False, True])
def test_both_exchanges_give_the_same_sums_and_gradients(nothing: bool) -> None:
    for torchs, theirs in spawn(RANKS, both_ways, nothing):
        for name in torchs:
            torch.testing.assert_close(theirs[name], torchs[name], rtol=2e-2, atol=1e-6)  # they send bfloat16


def test_an_exchange_that_is_not_there_is_refused() -> None:
    for name in ("deep_eep", "deep_ep"):
        with pytest.raises(ConfigError):
            check_exchange(name)


FOUR, D_MODEL = 4, 32  # d_model
GATE = "{name: group_limited, n_groups: 4, top_groups: 2, top_k: 3, scaling: 2.0,"


def limits() -> dict[int, int]:
    """M → bytes of this rank, of four experts a token among 1 … 4 of the 4 ranks."""
    assert GATE in DEEPSEEK
    found = {}
    for top_groups in (2, 4):
        gate = GATE.replace("top_groups: 2, top_k: 3", f"top_groups: {top_groups}, top_k: 4")
        step = FirstStep()
        model = DEEPSEEK.replace(GATE, gate)
        train(model, strategy={"expert": FOUR}, devices=FOUR, steps=1, callbacks=[step])
        found[top_groups] = step.counted.bytes["all_to_all"]
    return found


@pytest.mark.slow
def test_fewer_groups_send_less() -> None:
    ranks = spawn(FOUR, limits)
    limited, free = (sum(rank[m] for rank in ranks) for m in (2, 4))
    tokens, layers, passes = 8 * 12, 2, 4  # rows to the experts and back, forward and backward
    note = 1 + 2 * 2 / D_MODEL / 2  # beside a row, there and in its gradient, number and weight of up to 2 experts
    assert 0 < limited <= 2 * note * passes * layers * tokens * D_MODEL * 4  # no more than M copies of a token
    assert limited < 0.8 * free


WAITS = ("tolist", "item", "nonzero", "__int__", "__bool__", "__index__", "__float__", "cpu", "numpy")


def count_waits() -> list[Counter[str]]:
    """Calls that would make the host wait if the tensors were a GPU's, of one forward and backward pass."""
    from blockwright.training.parallel.build import Sharding, build
    from blockwright.training.parallel.meshes import make_meshes
    from blockwright.training.parallel.sizes import Sizes

    called: Counter[str] = Counter()
    found = []
    for sizes in ({"shard": 2, "expert": 2}, {"shard": 1, "tensor": 2}):
        model = read_model(MOE.replace("n_layers: 2", "n_layers: 1"))
        decoder = build(model, 0, Sharding(make_meshes(Sizes(**sizes), "cpu")))
        decoder.choose_kernels({"experts": "grouped"})  # a GPU's
        tokens = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(2):  # the first pass sets FSDP2 up
            called.clear()
            with pytest.MonkeyPatch.context() as patch:
                for name in WAITS:
                    patch.setattr(torch.Tensor, name, _counted(name, called))
                hidden, _ = decoder.hidden(tokens)
                hidden.square().sum().backward()
        found.append(Counter(called))
    return found


def _counted(name: str, called: Counter[str]) -> Any:
    inner = getattr(torch.Tensor, name)

    def call(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        called[name] += 1
        return inner(self, *arguments, **options)

    return call


@pytest.mark.slow
def test_a_layer_of_experts_waits_once() -> None:
    for over_experts, over_tensor in spawn(2, count_waits):
        assert sum(over_experts.values()) <= 1, over_experts
        assert sum(over_tensor.values()) <= 1, over_tensor
