"""Keys and values shared over depth: what borrowers compute and cache, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn

from blockwright.blocks.compose import check, compose
from blockwright.blocks.conformance.cases import CHECKS
from blockwright.blocks.conformance.setting import Setting
from blockwright.blocks.cost import cache_bytes, count_parameters, forward_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import BlockError, ConfigError
from blockwright.training.parallel.recompute import recompute

T = 11
GQA = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
WINDOW = {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 5}
ATTENTIONS: dict[str, dict[str, Any]] = {"gqa": GQA, "window": WINDOW, "mla": {"name": "mla", "n_heads": 4}}
MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 48,
    "n_layers": 3,
    "max_positions": 64,
    "init": {"std": 0.2},
    "position": "rope",
    "ffn": {"name": "swiglu", "d_ff": 20},
    "norm": "rmsnorm",
    "residual": "prenorm",
    "attention": GQA,
    "kv_source": "lent",
    "layout": {"kv_source": "lent borrowed*2"},
}
# Gemma 4's: windows borrow of windows, full layers of full ones, which have other heads and angles.
TYPES: dict[str, Any] = {
    "n_layers": 6,
    "attention": {**WINDOW, "qk_norm": "per_head"},
    "variants": {
        "attention": {"full": {"window": None, "head_dim": 8, "position": {"name": "rope", "theta": 500.0}}},
        "kv_source": {"own": None},
    },
    "layout": {"attention": "attention attention full attention attention full", "kv_source": "own lent*2 borrowed*3"},
}


def made(**changes: Any) -> Decoder:
    return compose(copy.deepcopy({**MODEL, **changes})).double().eval()


def tokens(length: int = T, rows: int = 2) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def inputs(decoder: Decoder, positions: Tensor, segments: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """What each attention reads and gives."""
    read, gave = list[Tensor](), list[Tensor]()

    def note(block: nn.Module, given: tuple[Any, ...], y: Tensor) -> None:
        read.append(given[0])
        gave.append(y)

    for layer in decoder.layers:
        layer.attention.register_forward_hook(note)  # type: ignore[union-attr]
    decoder.hidden(tokens(), positions, segments)
    return read, gave


def by_formula(decoder: Decoder, depth: int, read: list[Tensor], positions: Tensor, seen: Tensor) -> Tensor:
    """A layer's attention, token by token and head by head, with the keys that the first layer makes of its input."""
    lender, block = (decoder.layers[i].attention for i in (0, depth))
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


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@torch.no_grad()
def test_a_borrower_attends_to_what_the_lender_made_of_its_own_input(attention: str, packed: bool) -> None:
    decoder = made(attention=ATTENTIONS[attention])
    lengths = (4, 7) if packed else (T,)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None].expand(2, -1)
    read, gave = inputs(decoder, positions, segments if packed else None)
    at, document = torch.arange(T), segments[0]
    seen = (at[:, None] >= at) & (document[:, None] == document)
    seen &= (at[:, None] - at < 5) | (attention != "window")
    for depth in range(3):
        right = by_formula(decoder, depth, read, positions, seen)
        torch.testing.assert_close(gave[depth], right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "changes", [{"attention": ATTENTIONS["mla"]}, {"attention": WINDOW}, TYPES], ids=["mla", "window", "types"]
)
@pytest.mark.parametrize("bits", [None, 8])
@torch.no_grad()
def test_prompts_in_parts_ragged_rows_and_drafts_equal_one_pass(changes: dict[str, Any], bits: int | None) -> None:
    decoder, ids, padding = made(**changes), tokens(17, 3), torch.tensor([0, 6, 2])
    caches = decoder.new_caches(3, 24, bits, padding)
    parts = [decoder.hidden(part, caches=caches)[0] for part in ids[:, :13].split([7, 1, 5], 1)]
    marks = [cache.mark(2) for cache in caches]
    decoder.hidden(ids[:, :2], caches=caches)  # a draft of which nothing is kept
    for cache, mark in zip(caches, marks, strict=True):
        cache.rewind(mark)
    parts += [decoder.hidden(part, caches=caches)[0] for part in ids[:, 13:].split([1, 3], 1)]
    found = torch.cat(parts, 1)
    for row, n in enumerate(padding.tolist()):
        own = None if bits is None else decoder.new_caches(1, 24, bits)
        alone = decoder.hidden(ids[row : row + 1, n:], caches=own)[0]
        torch.testing.assert_close(found[row : row + 1, n:], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_generation_draws_what_whole_passes_give() -> None:
    decoder, prompt = made(**TYPES), tokens(7, 1)[0].tolist()
    for (token,) in Continuations(decoder, [prompt], 9, Sampling(0.0)):
        assert token == int(decoder(torch.tensor([prompt]))[0, -1].argmax())
        prompt.append(token)


def test_only_lenders_hold_caches_and_only_they_have_projections() -> None:
    decoder = made(**TYPES)
    assert [cache.nbytes > 0 for cache in decoder.new_caches(1, 32)] == [True] * 3 + [False] * 3
    held = {name.split(".")[1] for name, _ in decoder.named_parameters() if ".key." in name or ".k_norm." in name}
    assert held == {"0", "1", "2"}


def test_the_cost_card_counts_a_cache_once_and_no_keys_of_borrowers() -> None:
    shared, own = (compose({**MODEL, **more}, device="meta") for more in ({}, {"layout": None}))
    assert 3 * cache_bytes(shared, 40, torch.float32) == cache_bytes(own, 40, torch.float32)
    keys = 2 * 2 * 48 * 24  # two borrowers, keys and values
    assert count_parameters(own).total - count_parameters(shared).total == keys
    assert forward_flops_per_token(own, 16) - forward_flops_per_token(shared, 16) == 2 * keys


@pytest.mark.parametrize("how", ["full", "selective"])
def test_recomputed_layers_have_the_same_gradients(how: Any) -> None:
    decoder, ids = made(**TYPES), tokens()
    other = copy.deepcopy(decoder)
    recompute(other, how)
    found = []
    for model in (decoder, other):
        loss = model.nll(model.hidden(ids[:, :-1])[0], ids[:, 1:])
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("attention", ["gqa", "mla"])
@torch.no_grad()
def test_what_two_ranks_of_tensor_parallelism_compute_adds_up(attention: str) -> None:
    decoder, x = made(attention=ATTENTIONS[attention]), torch.randn(2, 7, 48, dtype=torch.float64)
    halves: list[list[Tensor]] = []
    for rank in (0, 1):
        given = Pass(torch.arange(7)[None], carry={})
        blocks = [copy.deepcopy(layer.attention) for layer in decoder.layers]
        for block in blocks:
            for name, how in block.parallel_plan().items():
                if how != "replicate":
                    parameter = block.get_parameter(name)
                    parameter.data = parameter.chunk(2, int(how == "row"))[rank]
        halves.append([block(x, given) for block in blocks])
    given = Pass(torch.arange(7)[None], carry={})
    whole = [layer.attention(x, given) for layer in decoder.layers]  # type: ignore[operator]
    for one, other, right in zip(*halves, whole, strict=True):
        torch.testing.assert_close(one + other, right, rtol=1e-9, atol=1e-9)


def test_yoco_caches_its_upper_half_once() -> None:
    layout = {"attention": "sliding_window*3 gqa*3", "kv_source": "own*3 lent borrowed*2"}
    variants = {"attention": {"sliding_window": WINDOW}, "kv_source": {"own": None}}
    decoder = made(n_layers=6, layout=layout, variants=variants)
    sizes = [cache.nbytes for cache in decoder.new_caches(1, 40)]
    assert sizes[0] == sizes[2] < sizes[3] and sizes[4:] == [0, 0]


FULL = {"variants": {"attention": {"other": {"window": None}}}}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no lender": ({"layout": {"kv_source": "borrowed lent*2"}}, "kv_source", "no layer below layer 0 lends such"),
    "another window": (
        {"attention": WINDOW, **FULL, "layout": {**MODEL["layout"], "attention": "attention other*2"}},
        "kv_source",
        "those below lend window 5",
    ),
    "other heads": (
        {
            "variants": {"attention": {"other": {"n_kv_heads": 1}}},
            "layout": {**MODEL["layout"], "attention": "attention other*2"},
        },
        "kv_source",
        "k 1×12",
    ),
    "other angles": (
        {"overrides": [{"layers": 2, "position": {"theta": 500.0}}]},
        "kv_source",
        "turns the queries of layer 2 by other angles",
    ),
    "other angles inside of another position": (
        {
            "position": {"name": "log_scaled", "inner": {"name": "rope"}},
            "overrides": [{"layers": 2, "position": {"inner": {"theta": 500.0}}}],
        },
        "kv_source",
        "turns the queries of layer 2 by other angles",
    ),
    "values to change": ({"values": "value_residual"}, "attention.values", "it borrows them"),
    "prediction of further tokens": ({"mtp": {"depth": 1}}, "mtp.depth", "begins with none"),
    "an attention without one": ({"attention": "differential"}, "kv_source", "no block of this model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_shared_is_refused_at_its_path(case: str) -> None:
    changes, path, rule = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        check({**MODEL, **changes})
    assert path in caught.value.path and rule in caught.value.rule


@pytest.mark.parametrize("position", ["alibi", "longrope", {"name": "banded", "inner": {"name": "rope"}}])
def test_layers_of_one_position_share_whatever_it_does(position: Any) -> None:
    check({**MODEL, "position": position})


def test_a_borrower_alone_says_what_it_lacks() -> None:
    block = made().layers[1].attention
    with pytest.raises(BlockError, match="none below lends any"):
        block(torch.zeros(1, 3, 48, dtype=torch.float64), Pass(torch.arange(3)[None], carry={}))


@pytest.mark.parametrize(
    ("name", "attention"),
    each(["stepping", "ragged rows", "quantised caches", "joining rows", "drafts", "allocation"], ["window", "mla"]),
)
def test_other_attentions_keep_the_contract_too(attention: str, name: str) -> None:
    node = {**ATTENTIONS[attention], "kv_source": {"name": "borrowed"}}
    CHECKS[name](Setting("attention", node["name"], node, brief=True))
