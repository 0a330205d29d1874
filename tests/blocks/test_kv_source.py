"""Keys and values shared over depth: what borrowers compute and cache, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.blocks.conformance.cases import CHECKS
from blockwright.blocks.conformance.setting import Setting
from blockwright.blocks.cost import cache_bytes, count_parameters, forward_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import BlockError
from blockwright.training.parallel.recompute import recompute
from tests.blocks.small import MODEL, decoder, drawn, ids, in_parts, model, near, order, packed, rewind

T = 11
WINDOW = {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 5}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": MODEL["attention"],
    "window": WINDOW,
    "mla": {"name": "mla", "n_heads": 4},
    "factorised": {"name": "factorised", "n_heads": 4},
    "tied": {"name": "grouped_tied", "n_heads": 4},
}
SHARED: dict[str, Any] = {"n_layers": 3, "kv_source": "lent", "layout": {"kv_source": "lent borrowed*2"}}
# Gemma 4's: windows borrow of windows, full layers of full ones, which have other heads and angles.
FULL = {"window": None, "head_dim": 8, "position": {"name": "rope", "theta": 500.0}}
TYPES: dict[str, Any] = {
    "n_layers": 6,
    "kv_source": "lent",
    "attention": {**WINDOW, "qk_norm": "per_head"},
    "variants": {"attention": {"full": FULL}, "kv_source": {"own": None}},
    "layout": {"attention": "attention attention full attention attention full", "kv_source": "own lent*2 borrowed*3"},
}


def by_formula(made: Decoder, depth: int, read: list[Tensor], positions: Tensor, seen: Tensor) -> Tensor:
    """A layer's attention, token by token and head by head, with the keys that the first layer makes of its input."""
    lender, block = (made.layers[i].attention for i in (0, depth))
    q = block.query(read[depth]).unflatten(-1, (4, -1))
    if hasattr(block, "kv_up"):
        latent, turning = lender.kv_down(read[0]).split((lender.latent, lender.rope), -1)
        k, v = block.kv_up(lender.kv_norm(latent)).unflatten(-1, (4, -1)).split((block.nope, block.v_head_dim), -1)
        q, q_turning = q.split((block.nope, block.rope), -1)
        q_turning, turning = block.position.rotate(q_turning, turning[:, :, None], positions)
        q, k = torch.cat((q, q_turning), -1), torch.cat((k, turning.expand(-1, -1, 4, -1)), -1)
    else:
        k, v = (project(read[0]).unflatten(-1, (2, -1)) for project in (lender.key, lender.value))
        q, k = block.position.rotate(q, k, positions)
        k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    y = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for row in range(len(q)):
        for t in range(T):
            for n in range(4):
                weights = (k[row, seen[t], n] @ q[row, t, n] * block.scale).softmax(0)
                y[row, t, n] = weights @ v[row, seen[t], n]
    return block.output(y.flatten(-2))


@pytest.mark.parametrize(
    ("attention", "lengths"), [("gqa", (T,)), ("window", (4, 7)), ("mla", (4, 7)), ("gqa", (4, 7))]
)
@torch.no_grad()
def test_a_borrower_attends_to_what_the_lender_made_of_its_own_input(attention: str, lengths: tuple[int, ...]) -> None:
    made, read, gave = decoder(**SHARED, attention=ATTENTIONS[attention]), list[Tensor](), list[Tensor]()

    def note(block: Any, given: tuple[Any, ...], y: Tensor) -> None:
        read.append(given[0])
        gave.append(y)

    for layer in made.layers:
        layer.attention.register_forward_hook(note)
    positions, segments = packed(*lengths, rows=2)
    made.hidden(ids(T), positions[:1], segments if len(lengths) > 1 else None)
    at, document = torch.arange(T), segments[0]
    seen = (at[:, None] >= at) & (document[:, None] == document)
    seen &= (at[:, None] - at < 5) | (attention != "window")
    for depth in range(3):
        near(gave[depth], by_formula(made, depth, read, positions[:1], seen), 1e-10, 1e-10)


@pytest.mark.parametrize(
    ("changes", "bits"),
    [({**SHARED, "attention": ATTENTIONS["mla"]}, 8), ({**SHARED, "attention": WINDOW}, None), (TYPES, 8)],
    ids=["mla", "window", "types"],
)
@torch.no_grad()
def test_prompts_in_parts_ragged_rows_and_drafts_equal_one_pass(changes: dict[str, Any], bits: int | None) -> None:
    made, tokens, padding = decoder(**changes), ids(17, 3), torch.tensor([0, 6, 2])
    caches = made.new_caches(3, 24, bits, padding)
    found = in_parts(made, tokens[:, :13], [7, 1, 5], caches)
    marks = [cache.mark(2) for cache in caches]
    made.hidden(tokens[:, :2], caches=caches)  # a draft of which nothing is kept
    rewind(caches, marks)
    found = torch.cat((found, in_parts(made, tokens[:, 13:], [1, 3], caches)), 1)
    for row, n in enumerate(padding.tolist()):
        own = None if bits is None else made.new_caches(1, 24, bits)
        near(found[row : row + 1, n:], made.hidden(tokens[row : row + 1, n:], caches=own)[0], 1e-9)


@torch.no_grad()
def test_generation_draws_what_whole_passes_give() -> None:
    made, prompt = decoder(**TYPES), ids(7, 1)[0].tolist()
    for (token,) in Continuations(made, [prompt], 5, Sampling(0.0)):
        assert token == int(made(torch.tensor([prompt]))[0, -1].argmax())
        prompt.append(token)


def test_only_lenders_hold_caches_and_projections_and_cost_them() -> None:
    made = decoder(**TYPES)
    assert [cache.nbytes > 0 for cache in made.new_caches(1, 32)] == [True] * 3 + [False] * 3
    held = {name.split(".")[1] for name, _ in made.named_parameters() if ".key." in name or ".k_norm." in name}
    assert held == {"0", "1", "2"}
    shared, own = (compose(model(**{**SHARED, **more}), device="meta") for more in ({}, {"layout": None}))
    assert 3 * cache_bytes(shared, 40, torch.float32) == cache_bytes(own, 40, torch.float32)
    keys = 2 * 2 * 48 * 24  # two borrowers, keys and values
    assert count_parameters(own).total - count_parameters(shared).total == keys
    assert forward_flops_per_token(own, 16) - forward_flops_per_token(shared, 16) == 2 * keys
    yoco: dict[str, Any] = {"layout": {"attention": "sliding_window*3 gqa*3", "kv_source": "own*3 lent borrowed*2"}}
    yoco |= {"variants": {"attention": {"sliding_window": WINDOW}, "kv_source": {"own": None}}}
    sizes = [c.nbytes for c in decoder(**yoco, n_layers=6, kv_source="lent").new_caches(1, 40)]  # its upper half once
    assert sizes[0] == sizes[2] < sizes[3] and sizes[4:] == [0, 0]


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_layers_have_the_same_gradients(how: Any) -> None:
    made, tokens = decoder(**TYPES), ids(T)
    other = copy.deepcopy(made)
    recompute(other, how)
    losses = [m.nll(m.hidden(tokens[:, :-1])[0], tokens[:, 1:]) for m in (made, other)]
    grads = [torch.autograd.grad(y, list(m.parameters())) for y, m in zip(losses, (made, other), strict=True)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("attention", ["gqa", "mla", "factorised", "tied"])
@torch.no_grad()
def test_what_two_ranks_of_tensor_parallelism_compute_adds_up(attention: str) -> None:
    made, x = decoder(**SHARED, attention=ATTENTIONS[attention]), drawn(2, 7, 48)
    halves: list[list[Tensor]] = []
    for rank in (0, 1):
        given, blocks = Pass(order(7), carry={}), [copy.deepcopy(layer.attention) for layer in made.layers]
        for block in blocks:
            for name, how in block.parallel_plan().items():
                if how != "replicate":
                    parameter = block.get_parameter(name)
                    parameter.data = parameter.chunk(2, int(how == "row"))[rank]
        halves.append([block(x, given) for block in blocks])
    given = Pass(order(7), carry={})
    for one, other, layer in zip(*halves, made.layers, strict=True):
        near(one + other, layer.attention(x, given), 1e-9, 1e-9)


def test_layers_of_one_position_share_whatever_it_does_and_a_borrower_alone_says_what_it_lacks() -> None:
    for position in ("alibi", "longrope", {"name": "banded", "inner": {"name": "rope"}}):
        check(model(**SHARED, position=position))
    with pytest.raises(BlockError, match="none below lends any"):
        decoder(**SHARED).layers[1].attention(drawn(1, 3, 48), Pass(order(3), carry={}))


@pytest.mark.parametrize(
    ("name", "attention"),
    each(["stepping", "ragged rows", "quantised caches", "joining rows", "drafts", "allocation"], list(ATTENTIONS)),
)
def test_other_attentions_keep_the_contract_too(attention: str, name: str) -> None:
    node = {**ATTENTIONS[attention], "kv_source": {"name": "borrowed"}}
    CHECKS[name](Setting("attention", node["name"], node, brief=True))


def test_every_attention_that_takes_changes_borrows_in_decoding_as_in_one_pass() -> None:
    takes = [n for n in registry.names("attention") if "kv_source" in registry.lookup("attention", n).schema.parameters]
    assert {"gqa", "mla", "factorised", "grouped_tied", "keys_as_values", "sliding_window"} <= set(takes)
    for name in takes:
        made, tokens = decoder(**SHARED, attention={"name": name, "n_heads": 4}), ids(T)
        with torch.no_grad():
            near(in_parts(made, tokens, (4, 7)), made.hidden(tokens)[0], 1e-9, 1e-9)
        lender, borrower = (sum(p.numel() for p in made.layers[i].attention.parameters()) for i in (0, 1))
        assert borrower < lender, name
