"""The seam of scored attention: what a block must say, what it gets for it, and blocks beside their definitions."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.attention import attending
from blockwright.blocks.attention.depth import NAMES
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.compose import compose
from blockwright.blocks.conformance.__main__ import main
from blockwright.blocks.conformance.cases import Case
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import few_keys, latent_attention
from blockwright.blocks.position.base import Position
from blockwright.registry import register

T, D, V = 13, 48, 61
LENGTHS = (7, 6)  # documents of a packed row


# --- blocks that are written wrongly ----------------------------------------------------------------------------------


class Written(Scored):
    """One head of keys and values for four of queries, written rightly."""

    def __init__(self, d_model: int, position: Position) -> None:
        super().__init__(d_model)
        self.position, self.scale, self.head_dim = position, 12**-0.5, 12
        self.query, self.output = nn.Linear(d_model, 48, bias=False), nn.Linear(48, d_model, bias=False)
        self.both = nn.Linear(d_model, 24, bias=False)

    @classmethod
    def child_context(cls, child: str, known: Any) -> Any:
        return {**super().child_context(child, {**known, "n_heads": 4})}

    def project(self, x: Tensor, given: Pass) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self.both(x).unflatten(-1, (2, 1, 12)).unbind(2)
        return *given.rotated(self.position, self.query(x).unflatten(-1, (4, 12)), k), v

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        q, k, v = self.project(x, given)
        return self.output(self.attend(x, given, q, {"k": k, "v": v}).flatten(-2))

    def parallel_plan(self) -> Any:
        return dict.fromkeys(("query.weight", "both.weight", "output.weight"), "replicate")


class Twice(Written):
    """It attends twice."""

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return super().mix(x, given) + super().mix(x, given)


class Never(Written):
    """It attends by itself."""

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        q, _, v = self.project(x, given)
        return self.output((q * v).flatten(-2))


class Misdeclared(Written):
    """Its memory is not what it remembers."""

    def memory(self) -> Any:
        return {"k": [(1, 12)], "v": [(1, 24)]}


class OtherName(Written):
    """Its memory has another name."""

    def memory(self) -> Any:
        return {"k": [(1, 12)], "values": [(1, 12)]}


class Valued(Written):
    """Its shapes follow from values."""

    def mix(self, x: Tensor, given: Pass) -> Tensor:
        return super().mix(x * float(x.max()), given)


WRONG = {
    Twice: "Twice.mix calls attend 2 times; it must once",
    Never: "Never.mix calls attend 0 times; it must once",
    Misdeclared: "'v': (1, 24)",
    OtherName: "'values': (1, 12)",
    Valued: "Valued.mix fails on a token without values",
}


@pytest.fixture
def decoder(temporary_blocks: None) -> Callable[..., Decoder]:
    def build(cls: type[Scored], **more: Any) -> Decoder:
        register("attention", "written")(cls)
        return compose(model("written", **more), seed=1).eval()

    return build


def model(attention: Any, **more: Any) -> dict[str, Any]:
    node = {"name": attention} if isinstance(attention, str) else attention
    around: dict[str, Any] = {"vocab_size": V, "d_model": D, "n_layers": 2, "max_positions": 64, "norm": "rmsnorm"}
    around |= {"init": {"std": 0.2, "depth_scaled": False}, "position": "rope", "ffn": {"name": "swiglu", "d_ff": 24}}
    return {**around, "residual": "prenorm", "attention": node, **more}


@pytest.mark.parametrize("cls", WRONG)
def test_block_that_is_written_wrongly_is_named(cls: type[Written], decoder: Callable[..., Decoder]) -> None:
    made = decoder(cls)
    with pytest.raises(TypeError) as refused, torch.no_grad():
        made.hidden(torch.zeros(1, 3, dtype=torch.int64), caches=made.new_caches(1, 8))
    assert WRONG[cls] in str(refused.value)


@pytest.mark.parametrize("cls", [cls for cls in WRONG if cls is not Valued])
def test_kit_says_what_is_wrong(cls: type[Written], decoder: Callable[..., Decoder]) -> None:
    decoder(cls)
    outcome = Case("attention", "written", "memory").outcome()
    assert outcome.status == "failed" and outcome.reason


def test_block_that_is_written_rightly_gets_every_promise(decoder: Callable[..., Decoder]) -> None:
    """Nothing is declared: its slots are found."""
    made = decoder(Written)
    assert [cache.nbytes for cache in made.new_caches(1, 8)] == [8 * 24 * 4] * 2
    for check in ("memory", "stepping", "ragged rows", "quantised caches", "packing", "allocation"):
        assert Case("attention", "written", check).brief().status == "passed", check


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
    draws = torch.Generator().manual_seed(5)
    return [torch.randn(2, T, 2, 2, 6, dtype=torch.float64, generator=draws) for _ in range(2)]


DEFINED: dict[str, tuple[Any, Callable[[Tensor, Any], Tensor]]] = {
    "differential": ("differential", differential),
    "grouped_tied": ("grouped_tied", grouped_tied),
    "factorised": ("factorised", factorised),
    "depth": ("depth", depth),
    "talking heads": ({"name": "mha", "scores": "talking_heads"}, talking_heads),
}


@pytest.mark.parametrize("name", DEFINED)
def test_block_is_its_definition(name: str, make_block: Callable[..., Any]) -> None:
    """In double precision, without positions, on two packed documents; and the gradients."""
    node, definition = DEFINED[name]
    block = make_block("attention", node, layer_idx=1, around={"position": "none"})
    x = torch.randn(2, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    segments, positions = (torch.arange(T) >= LENGTHS[0]).long()[None].expand(2, -1), torch.arange(T)[None]
    carry = dict(zip(NAMES, below(), strict=True))
    found, right = block(x, Pass(positions, segments=segments, carry=carry)), definition(x, block)
    torch.testing.assert_close(found, right, rtol=0, atol=1e-11)
    weights = [*block.parameters(), x]
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (found, right))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_differential_attention_is_that_of_transformers(make_block: Callable[..., Any]) -> None:
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
    x, positions = torch.randn(2, T, D, dtype=torch.float64), torch.arange(T)[None]
    with torch.no_grad():
        right = theirs(x, turn(x, positions))[0]
        torch.testing.assert_close(ours(x, Pass(positions)), right, rtol=0, atol=1e-6)  # its λ is fp32


@pytest.mark.parametrize("name", DEFINED)
def test_parts_of_the_plan_add_up(name: str, make_block: Callable[..., Any]) -> None:
    """Two halves of the heads, as ranks hold them, give the whole together."""
    block = make_block("attention", DEFINED[name][0], layer_idx=1, around={"position": "none"})
    x, positions = torch.randn(2, T, D, dtype=torch.float64), torch.arange(T)[None]
    plan, total = block.parallel_plan(), 0
    if "column" not in plan.values():
        return
    for half in (0, 1):
        part = copy.deepcopy(block)
        for parameter, how in plan.items():
            tensor = part.get_parameter(parameter)
            if how != "replicate":
                tensor.data = tensor.data.chunk(2, 0 if how == "column" else 1)[half]
        total = total + part(x, Pass(positions))
    torch.testing.assert_close(total, block(x, Pass(positions)), rtol=0, atol=1e-10)


def test_example_of_the_page_is_a_block(temporary_blocks: None) -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/add-a-block.md").read_text()
    (code,) = re.findall(r"```python\n(# my_blocks/tied.py.*?)```", page, re.S)
    exec(code, {"__name__": "tied"})
    for check in (
        "memory",
        "stepping",
        "ragged rows",
        "quantised caches",
        "packing",
        "parallel plan",
        "hyper-parameters",
    ):
        assert Case("attention", "tied", check).brief().status == "passed", check


def test_talking_heads_begin_as_a_plain_softmax() -> None:
    plain, talking = (
        compose(model({"name": "mha", **more}), seed=3).eval() for more in ({}, {"scores": "talking_heads"})
    )
    talking.load_state_dict(plain.state_dict(), strict=False)
    ids = torch.arange(T)[None]
    torch.testing.assert_close(talking(ids), plain(ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_one_cause_is_told_once(decoder: Callable[..., Decoder], capsys: pytest.CaptureFixture[str]) -> None:
    decoder(Misdeclared)
    assert main(["attention/written"]) == 1
    said = capsys.readouterr().out
    assert said.count("memory() must say the same") == 1 and "as 'stepping'" in said and "failed, of " in said


BLOCKS = {n: registry.lookup("attention", n).cls for n in registry.names("attention")}
SCORED = {n: cls for n, cls in BLOCKS.items() if issubclass(cls, Scored)}


def test_no_block_says_anything_of_caches() -> None:
    """But one that keeps other keys too; and each declares what it remembers, so nothing has to be found."""
    for name, cls in SCORED.items():
        assert "forward" not in vars(cls) and cls.memory is not Scored.memory, name
        if cls.new_cache is Scored.new_cache:
            assert "cache." not in inspect.getsource(inspect.getmodule(cls)), name  # type: ignore[arg-type]
    assert len(SCORED) >= 10


@pytest.mark.parametrize("attention", ["mla", pytest.param("gqa", marks=pytest.mark.slow)])
@torch.no_grad()
def test_every_way_of_attending_is_the_same(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, absorbed, on few keys gathered, and some heads at a time, of a block with ``up`` and of one without."""
    ids = torch.randint(V, (2, 57), generator=torch.Generator().manual_seed(3))
    chosen = {"selector": {"name": "dsa", "top_k": 3}}
    for more in ({}, chosen):
        decoder = compose(model({"name": attention, "n_heads": 4, **more}), seed=3).double().eval()
        right = decoder.hidden(ids)[0]
        for way in ("absorbed", "expanded", "one head at a time", "few keys"):
            with monkeypatch.context() as patch:
                patch.setattr(attending, "absorbs", lambda *_, way=way: way == "absorbed")
                patch.setattr(latent_attention, "KEPT", 0 if way == "one head at a time" else 2**26)
                patch.setattr(latent_attention, "EXPANDED", 1 if way == "one head at a time" else 2**28)
                for name in ("PART", "PART_OF_SEVERAL", "LEAST"):
                    patch.setattr(few_keys, name, 1 if way == "few keys" else 10**6)
                caches = decoder.new_caches(2, 57)
                parts = [decoder.hidden(part, caches=caches)[0] for part in ids.split([20, 13, 1, 1, 22], 1)]
            torch.testing.assert_close(
                torch.cat(parts, 1), right, rtol=0, atol=1e-9, msg=lambda m, way=way: f"{way}: {m}"
            )


# --- what a block gets ------------------------------------------------------------------------------------------------

SELECTORS = [name for name in registry.names("selector") if name != "shared"]
OF_SCORES = ["differential", "grouped_tied", "factorised", "depth"]


@pytest.mark.parametrize(("attention", "selector"), each(OF_SCORES, list(SELECTORS)))
@torch.no_grad()
def test_selectors_choose_alike_with_a_cache(attention: str, selector: str) -> None:
    """In parts and token by token, where few keys are gathered, as in one pass."""
    settings = {"block": {"block_size": 4}, "pooled": {}, "dsa": {}}.get(selector, {})
    node = {"name": attention, "n_heads": 4, "selector": {"name": selector, "top_k": 2, **settings}}
    decoder = compose(model(node), seed=3).double().eval()
    ids = torch.randint(V, (2, 41), generator=torch.Generator().manual_seed(3))
    caches = decoder.new_caches(2, 41)
    parts = [decoder.hidden(part, caches=caches)[0] for part in ids.split([19, 1, 1, 20], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), decoder.hidden(ids)[0], rtol=0, atol=1e-9)
