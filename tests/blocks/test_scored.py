"""The seam of scored attention: what a block gets, how each mistake is named, and blocks beside their definitions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.attention.depth import NAMES
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.conformance.__main__ import main
from blockwright.blocks.conformance.cases import CHECKS, Case
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.norm import Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.selector.base import Selector
from blockwright.registry import register
from tests.blocks.small import D, Make, decoder, drawn, ids, in_parts, near, order

T = 13
LENGTHS = (7, 6)  # documents of a packed row
SHORT = [c for c in CHECKS if c not in ("hyper-parameters", "width rules", "joining rows", "flops", "compile")]


# --- an attention that is written rightly, and the ways to write it wrongly -------------------------------------------


class Written(Scored):
    """One head of keys and values for four of queries."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model)
        self.position, self.scale = position, 12**-0.5
        self.query, self.output = nn.Linear(d_model, 48, bias=False), nn.Linear(48, d_model, bias=False)
        self.both = nn.Linear(d_model, 24, bias=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**super().child_context(child, {**known, "n_heads": 4}), "head_dim": 12}

    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        k, v = self.both(x).unflatten(-1, (2, 1, 12)).unbind(2)
        q, k = given.rotated(self.position, self.query(x).unflatten(-1, (4, 12)), k)
        return q, {"k": k, "v": v}

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return self.output(self.attend(x, given, *self.given_to_attend(x, given)).flatten(-2))

    def memory(self) -> Any:
        return {"k": [(1, 12)], "v": [(1, 12)]}


class NoScale(Written):
    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model, position)
        del self.scale


class NoPosition(Written):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, None)
        del self.position

    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        k, v = self.both(x).unflatten(-1, (2, 1, 12)).unbind(2)
        return self.query(x).unflatten(-1, (4, 12)), {"k": k, "v": v}


class WidthOfANorm(Written):
    def __init__(self, d_model: int, position: Position, head_norm: Norm) -> None:
        super().__init__(d_model, position)
        self.head_norm = head_norm

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return self.output(self.head_norm(self.attend(x, given, *self.given_to_attend(x, given))).flatten(-2))


class PartedHeads(Written):
    """The last head of queries uses the first of values, which another rank has."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model, position)
        del self.both
        self.key, self.value = (nn.Linear(d_model, 48, bias=False) for _ in range(2))

    def given_to_attend(self, x: Tensor, given: Pass) -> tuple[Tensor, Any]:
        q, k, v = (W(x).unflatten(-1, (-1, 12)) for W in (self.query, self.key, self.value))
        q, k = given.rotated(self.position, q, k)
        return q, {"k": k, "v": v.flip(2)}

    def memory(self) -> Any:
        heads = self.key.weight.shape[0] // 12
        return {"k": [(heads, 12)], "v": [(heads, 12)]}

    def parallel_plan(self) -> Any:
        return {**dict.fromkeys(("query.weight", "key.weight", "value.weight"), "column"), "output.weight": "row"}


class IgnoredSelector(Written):
    def __init__(self, d_model: int, position: Position, selector: Selector | None = None) -> None:
        super().__init__(d_model, position)
        self.chooses = selector


def wrong(**methods: Any) -> type[Written]:
    return type("Wrong", (Written,), methods)


def mixing(f: Callable[[Any, Tensor, Pass], Tensor]) -> type[Written]:
    return wrong(mix=f)


def giving(f: Callable[[Tensor, Any], Any]) -> type[Written]:
    return wrong(given_to_attend=lambda self, x, given: f(*Written.given_to_attend(self, x, given)))


def without_attending(block: Any, x: Tensor, given: Pass) -> Tensor:
    q, held = block.given_to_attend(x, given)
    return block.output((q * held["v"]).flatten(-2))


def changing(block: Any, x: Tensor, given: Pass) -> Tensor:
    y = Written.mix(block, x, given)
    x += 1
    return y


def counting(block: Any, x: Tensor, given: Pass) -> Any:
    return Written.given_to_attend(block, x, given._replace(positions=torch.arange(x.shape[1], device=x.device)[None]))


def keeping(block: Any, x: Tensor, given: Pass, q: Tensor, held: Any, latent: Any = None, beside: Any = None) -> Tensor:
    block.last = held["k"]
    return Scored.attend(block, x, given, q, held)


mix = Written.mix
# The first check that fails, and a word of what it says.
MISTAKES: dict[str, tuple[type[Written], str, str]] = {
    "attends twice": (mixing(lambda s, x, g: mix(s, x, g) + mix(s, x, g)), "shape and dtype", "2 times"),
    "attends never": (mixing(without_attending), "shape and dtype", "0 times"),
    "declares nothing": (wrong(memory=Scored.memory), "memory", "memory()"),
    "declares other shapes": (wrong(memory=lambda self: {"k": [(1, 12)], "v": [(1, 24)]}), "memory", "(1, 24)"),
    "declares other names": (wrong(memory=lambda self: {"k": [(1, 12)], "vs": [(1, 12)]}), "memory", "'vs'"),
    "reads values": (
        mixing(lambda s, x, g: mix(s, x if float(x.sum()) < 99 else -x, g)),
        "shape and dtype",
        "without values",
    ),
    "sets no scale": (NoScale, "shape and dtype", "self.scale"),
    "sets no position": (NoPosition, "shape and dtype", "self.position"),
    "has heads before tokens": (giving(lambda q, h: (q.transpose(1, 2), h)), "shape and dtype", "[2, 4, 7, 12]"),
    "leaves heads flat": (giving(lambda q, h: (q.flatten(2), h)), "shape and dtype", "[B,T,N,H]"),
    "remembers a tuple": (giving(lambda q, h: (q, tuple(h.values()))), "shape and dtype", "dict"),
    "remembers no tensor": (giving(lambda q, h: (q, {**h, "decay": 0.5})), "shape and dtype", "float"),
    "remembers one token": (giving(lambda q, h: (q, {**h, "k": h["k"][:, :1]})), "shape and dtype", "each token"),
    "has wider queries": (giving(lambda q, h: (q, {**h, "k": h["k"][..., :8]})), "shape and dtype", "width 8"),
    "has heads that do not divide": (
        giving(lambda q, h: (q, {name: t.expand(-1, -1, 3, -1) for name, t in h.items()})),
        "shape and dtype",
        "3 of keys",
    ),
    "expands keys alone": (wrong(expand=lambda self, held: held[0]), "shape and dtype", "expand"),
    "expands to other heads": (
        wrong(expand=lambda self, held: (held[0], held[1].repeat_interleave(2, 2))),
        "shape and dtype",
        "as many heads",
    ),
    "forgets the projection": (
        mixing(lambda s, x, g: s.attend(x, g, *s.given_to_attend(x, g))),
        "shape and dtype",
        "W_o",
    ),
    "forgets the width of a norm": (WidthOfANorm, "shape and dtype", "child_context"),
    "changes its input": (mixing(changing), "nothing written", "in place"),
    "keeps its keys": (wrong(attend=keeping), "nothing written", "self.last"),
    "looks ahead": (mixing(lambda s, x, g: mix(s, x + x.mean(1, keepdim=True), g)), "causality", ""),
    "mixes rows": (mixing(lambda s, x, g: mix(s, x - 0.5 * x.mean(0), g)), "batch invariance", ""),
    "parts heads that belong together": (PartedHeads, "parallel plan", "two ranks"),
    "ignores its selector": (IgnoredSelector, "memory", "self.selector"),
    "counts positions itself": (wrong(given_to_attend=counting), "stepping", ""),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if i % 4 == 0 else pytest.mark.slow) for i, name in enumerate(MISTAKES)]
)
def test_mistake_is_named(temporary_blocks: None, name: str) -> None:
    cls, check, word = MISTAKES[name]
    register("attention", "written")(cls)
    first = next(c for c in SHORT if c == check or Case("attention", "written", c).brief().status == "failed")
    outcome = Case("attention", "written", check).outcome()
    assert (first, outcome.status) == (check, "failed"), Case("attention", "written", first).brief()
    assert word in outcome.reason, outcome.reason


def test_block_without_a_mistake_gets_every_promise(temporary_blocks: None) -> None:
    register("attention", "written")(Written)
    failed = {check: Case("attention", "written", check).brief() for check in SHORT}
    assert not {check: o.reason for check, o in failed.items() if o.status == "failed"}
    made = decoder(torch.float32, attention="written")
    assert [cache.nbytes for cache in made.new_caches(1, 8)] == [8 * 24 * 4] * 2


@pytest.mark.slow
def test_one_cause_is_told_once(temporary_blocks: None, capsys: pytest.CaptureFixture[str]) -> None:
    register("attention", "written")(MISTAKES["sets no position"][0])
    assert main(["attention/written"]) == 1
    said = capsys.readouterr().out
    assert said.count("no attribute 'position'") == 1 and "as 'causality'" in said and "failed, of " in said


def test_example_of_the_page_is_a_block(temporary_blocks: None) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/block-reference.md").read_text()
    (code,) = re.findall(r"```python\n(# my_blocks/tied.py.*?)```", page, re.S)
    exec(code, {"__name__": "tied"})
    for check in ("memory", "stepping", "quantised caches", "packing", "parallel plan", "hyper-parameters"):
        assert Case("attention", "tied", check).brief().status == "passed", check


def test_no_block_says_anything_of_caches() -> None:
    """But one that keeps other keys too; and each declares what it remembers, so nothing has to be found."""
    blocks = {n: registry.lookup("attention", n).cls for n in registry.names("attention")}
    scored = {n: cls for n, cls in blocks.items() if issubclass(cls, Scored)}
    for name, cls in scored.items():
        assert "forward" not in vars(cls) and cls.memory is not Scored.memory, name
        own = cls.new_cache is not Scored.new_cache
        assert own or "cache." not in inspect.getsource(inspect.getmodule(cls)), name
    assert len(scored) >= 10


# --- blocks beside their definitions ----------------------------------------------------------------------------------


def softmax_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Weights [B,N,T,T] within two documents."""
    at = torch.arange(T)
    document = (at >= LENGTHS[0]).long()
    seen = (at[:, None] >= at) & (document[:, None] == document)
    return (torch.einsum("btnh,bsnh->bnts", q, k) * scale).masked_fill(~seen, float("-inf")).softmax(-1)


def heads(x: Tensor, weight: Tensor, width: int) -> Tensor:
    return (x @ weight.T).unflatten(-1, (-1, width))


def times(weights: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bnts,bsnv->btnv", weights, v)


def differential(x: Tensor, block: Any) -> Tensor:
    q, k, v = (heads(x, m.weight, w) for m, w in ((block.query, 6), (block.key, 6), (block.value, 12)))
    lambda_0 = 0.8 - 0.6 * torch.tensor(-0.3 * 1, dtype=x.dtype).exp()
    a, b, c, d = block.factors
    share = (a * b).sum().exp() - (c * d).sum().exp() + lambda_0
    w = softmax_map(q, k, 6**-0.5)
    y = times(w[:, ::2] - share * w[:, 1::2], v)
    y = y / (y.square().mean(-1, keepdim=True) + block.head_norm.eps).sqrt() * block.head_norm.weight
    return ((1 - lambda_0) * y).flatten(-2) @ block.output.weight.T


def grouped_tied(x: Tensor, block: Any) -> Tensor:
    q, v, r = heads(x, block.query.weight, 6), heads(x, block.tied.weight, 6), heads(x, block.rotating.weight, 2)
    k = torch.cat((v[..., :4], r.expand(-1, -1, 2, -1)), -1)
    k, v = (t.repeat_interleave(4, 2) for t in (k, v))
    return times(softmax_map(q, k, 6**-0.5), v).flatten(-2) @ block.output.weight.T


def factorised(x: Tensor, block: Any) -> Tensor:
    c = x @ block.down.weight.T
    c = c / (c.square().mean(-1, keepdim=True) + block.q_norm.eps).sqrt() * block.q_norm.weight
    q, k, v = (heads(t, m.weight, 12) for t, m in ((c, block.up_query), (x, block.key), (x, block.value)))
    k, v = (t.expand(-1, -1, 8, -1) for t in (k, v))
    return times(softmax_map(q, k, 12**-0.5), v).flatten(-2) @ block.output.weight.T


def talking_heads(x: Tensor, block: Any) -> Tensor:
    q, k, v = (heads(x, m.weight, 6) for m in (block.query, block.key, block.value))
    scores = torch.einsum("btnh,bsnh->bnts", q, k) * 6**-0.5
    scores = torch.einsum("mn,bnts->bmts", block.scores.of_scores, scores)
    hidden = softmax_map(torch.zeros_like(q), torch.zeros_like(k), 1.0) == 0
    weights = torch.einsum("mn,bnts->bmts", block.scores.of_weights, scores.masked_fill(hidden, -1e30).softmax(-1))
    return times(weights, v).flatten(-2) @ block.output.weight.T


def depth(x: Tensor, block: Any) -> Tensor:
    """A third layer: the keys and values of the two below are drawn by ``below``."""
    q, k, v = (heads(x, m.weight, 6) for m in (block.query, block.key, block.value))
    keys, values = (torch.stack((*part.unbind(2), own), 2) for part, own in zip(below(), (k, v), strict=True))
    asking = q.unflatten(2, (2, 4)).mean(3)
    weights = (torch.stack([(asking * keys[:, :, j]).sum(-1) for j in range(3)], 2) * 6**-0.5).softmax(2)
    v = sum(weights[:, :, j, :, None] * values[:, :, j] for j in range(3))
    k, v = (t.repeat_interleave(4, 2) for t in (k, v))
    return times(softmax_map(q, k, 6**-0.5), v).flatten(-2) @ block.output.weight.T


def below() -> list[Tensor]:
    """Keys and values [B,T,2,K,H] of two layers below."""
    return [drawn(2, T, 2, 2, 6, seed=seed) for seed in (5, 6)]


DEFINED: dict[str, tuple[Any, Callable[[Tensor, Any], Tensor]]] = {
    "differential": ("differential", differential),
    "grouped_tied": ("grouped_tied", grouped_tied),
    "factorised": ("factorised", factorised),
    "depth": ("depth", depth),
    "talking heads": ({"name": "mha", "scores": "talking_heads"}, talking_heads),
}


@pytest.mark.parametrize("name", DEFINED)
def test_block_is_its_definition(make_block: Make, name: str) -> None:
    """In double precision, without positions, on two packed documents; and the gradients."""
    node, definition = DEFINED[name]
    block = make_block("attention", node, layer_idx=1, around={"position": "none"})
    x = drawn(2, T, D, seed=2).requires_grad_()
    segments, positions = (torch.arange(T) >= LENGTHS[0]).long()[None].expand(2, -1), torch.arange(T)[None]
    carry = dict(zip(NAMES, below(), strict=True))
    found, right = block(x, Pass(positions, segments=segments, carry=carry)), definition(x, block)
    near(found, right, 1e-11)
    near(*(torch.autograd.grad(y.square().sum(), [*block.parameters(), x]) for y in (found, right)), 1e-9, 1e-9)


def test_differential_attention_is_that_of_transformers(make_block: Make) -> None:
    """DiffLlama puts the first maps of all heads before the second ones; here a head's two maps lie side by side."""
    from transformers import DiffLlamaConfig
    from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding

    sizes: Any = {"hidden_size": D, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-6}
    torch.manual_seed(0)
    config = DiffLlamaConfig(**sizes, attn_implementation="sdpa", lambda_std_dev=0.5)
    theirs, turn = DiffLlamaAttention(config, layer_idx=3).double(), DiffLlamaRotaryEmbedding(config)
    ours = make_block("attention", {"name": "differential", "n_heads": 4}, layer_idx=3, around={"position": "rope"})
    for mine, other in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        halves = theirs.get_parameter(f"{other}.weight").unflatten(0, (2, 4, 6)).transpose(0, 1)
        ours.get_parameter(f"{mine}.weight").data.copy_(halves.flatten(0, 2))
    ours.output.weight.data.copy_(theirs.o_proj.weight)
    ours.factors.data.copy_(torch.stack((theirs.lambda_q1, theirs.lambda_k1, theirs.lambda_q2, theirs.lambda_k2)))
    ours.head_norm.weight.data.fill_(1)
    x = drawn(2, T, D)
    with torch.no_grad():
        near(ours(x, Pass(order(T))), theirs(x, turn(x, order(T)))[0], 1e-6)  # its λ is fp32


def test_talking_heads_begin_as_a_plain_softmax() -> None:
    nodes = ({"name": "mha", "n_heads": 4, **more} for more in ({}, {"scores": "talking_heads"}))
    plain, talking = (decoder(torch.float32, attention=node) for node in nodes)
    talking.load_state_dict(plain.state_dict(), strict=False)
    near(talking(ids(T)), plain(ids(T)), 1e-5)


@pytest.mark.parametrize(
    ("attention", "selector"),
    each(
        ["differential", "grouped_tied", "factorised", "depth"],
        [name for name in registry.names("selector") if name != "shared"],
    ),
)
@torch.no_grad()
def test_selectors_choose_alike_with_a_cache(attention: str, selector: str) -> None:
    """In parts and token by token, where few keys are gathered, as in one pass."""
    settings = {"block_size": 4} if selector == "block" else {}
    node = {"name": attention, "n_heads": 4, "selector": {"name": selector, "top_k": 2, **settings}}
    made, tokens = decoder(seed=3, attention=node), ids(41, seed=3)
    near(in_parts(made, tokens, [19, 1, 1, 20]), made.hidden(tokens)[0], 1e-9)
