"""Biases that depend on their query, or on what was noted of each key, however attention is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention import attending, biases
from blockwright.blocks.attention.biases import score_bias
from blockwright.blocks.base import Placement
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels import few_keys, latent_attention, long_attention
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import Band, Slopes, dense, part
from blockwright.blocks.position.base import Position
from blockwright.blocks.remembering import Keys, Queries
from blockwright.registry import BlockError, ConfigError, register

V, D, T = 61, 48, 57
BANDED = {"name": "banded", "rank": 3, "extent": 9}
SCALED = {"name": "log_scaled", "floor": 5, "scale": 0.5, "inner": BANDED}
DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-5)]


@pytest.fixture(autouse=True)
def noting(temporary_blocks: None) -> None:
    """A position that has a number remembered of each token: a bias of what lies between a key and its query."""

    @register("position", "between")
    class Between(Position):
        def __init__(self, d_model: int, n_heads: int) -> None:
            super().__init__()
            self.gate = nn.Linear(d_model, n_heads)

        def slots(self) -> dict[str, tuple[int, ...]]:
            return {"fade": (self.gate.out_features,)}

        def remember(self, x: Tensor, positions: Tensor, declared: int) -> tuple[Tensor, ...]:
            return (F.logsigmoid(self.gate(x)),)

        def bias(self, queries: Queries, keys: Keys) -> Tensor:
            order = keys.order.argsort()
            since = keys.noted[0][:, order].cumsum(1)
            own = since[:, since.shape[1] - queries.q.shape[1] :]
            return own.mT[..., None] - since[:, order.argsort()].mT[:, :, None]

        def parallel_plan(self) -> dict[str, Placement]:
            return {"gate.weight": "column", "gate.bias": "column"}


def decoder(attention: dict[str, Any], position: Any) -> Decoder:
    model = {"vocab_size": V, "d_model": D, "n_layers": 2, "max_positions": 64, "norm": "rmsnorm"}
    model |= {"residual": "prenorm", "ffn": {"name": "swiglu", "d_ff": 24}, "init": {"std": 0.2, "depth_scaled": False}}
    return compose({**model, "attention": attention, "position": position}, seed=3).double().eval()


def tokens() -> Tensor:
    """None twice in a row: where nothing rotates, their keys are equal, and rounding decides which is chosen."""
    draw = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(V, generator=draw)[:T] for _ in range(2)])


# --- the published bias -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_band_is_that_of_transformers(make_block: Callable[..., Any], dtype: torch.dtype, tolerance: float) -> None:
    """Forward and gradients, of the last queries of longer keys too."""
    from transformers.models.inkling.modeling_inkling import InklingRelativeLogits

    ours = make_block("position", BANDED, d_model=D, n_heads=4, head_dim=12).to(dtype)
    theirs = InklingRelativeLogits(3, 9).to(dtype)
    theirs.proj.data.copy_(ours.bank.data)
    x, q = torch.randn(2, 13, D, dtype=dtype, requires_grad=True), torch.randn(2, 13, 4, 12, dtype=dtype)
    queries, keys = torch.arange(4, 17), torch.arange(17)
    found = dense(ours.bias(Queries(x, q, queries[None]), Keys(keys[None], keys)))
    right = theirs(ours.mixture(x).unflatten(-1, (4, 3)), queries, keys)
    torch.testing.assert_close(found, right, rtol=0, atol=tolerance)
    weigh = torch.randn_like(right)
    one = torch.autograd.grad((found * weigh).sum(), [x, ours.mixture.weight, ours.bank])
    other = torch.autograd.grad((right * weigh).sum(), [x, ours.mixture.weight, theirs.proj])
    for mine, its in zip(one, other, strict=True):
        torch.testing.assert_close(mine, its, rtol=tolerance, atol=10 * tolerance)


def test_scores_and_bias_grow_together_from_the_floor_on(make_block: Callable[..., Any]) -> None:
    around = {"d_model": D, "n_heads": 4, "head_dim": 12}
    scaled, plain = make_block("position", SCALED, **around), make_block("position", BANDED, **around)
    plain.load_state_dict({n.removeprefix("inner."): t for n, t in scaled.state_dict().items()})
    x, q = torch.randn(1, 9, D, dtype=torch.float64), torch.randn(1, 9, 4, 12, dtype=torch.float64)
    places, order = torch.arange(9)[None], torch.arange(9)
    growth = torch.tensor([1 + 0.5 * max(0.0, float(torch.log(torch.tensor((t + 1) / 5)))) for t in range(9)])
    turned, key = scaled.rotate(q, q, places)
    torch.testing.assert_close(turned, q * growth[None, :, None, None], rtol=1e-6, atol=1e-6)
    assert torch.equal(key, q)
    found, right = (dense(p.bias(Queries(x, q, places), Keys(places, order))) for p in (scaled, plain))
    assert found is not None and right is not None
    torch.testing.assert_close(found, right * growth[:, None], rtol=1e-6, atol=1e-6)


# --- formulas ---------------------------------------------------------------------------------------------------------

PLACES = torch.stack((torch.arange(13) % 5, torch.arange(13)))
FORMULAS = {
    "slopes": Slopes(torch.randn(4), PLACES, PLACES),
    "band": Band(torch.randn(2, 13, 4, 6), PLACES, PLACES),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_part_of_a_formula_is_that_of_the_tensor(name: str) -> None:
    formula = FORMULAS[name]
    whole, parts = formula.dense(), (slice(1, 2), slice(1, 3), slice(4, 9), slice(2, 13))
    assert torch.equal(part(formula, *parts), whole[parts])  # type: ignore[arg-type]
    assert torch.equal(part(whole, *parts), whole[parts])  # type: ignore[arg-type]
    at = torch.meshgrid(*(torch.arange(n) for n in whole.shape), indexing="ij")
    torch.testing.assert_close(formula.added(2)(*at), whole)


# --- every way of attending -------------------------------------------------------------------------------------------

POSITIONS = {"banded": BANDED, "scaled": SCALED, "between": "between"}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "mla": {"name": "mla", "n_heads": 4},
    "window": {"name": "sliding_window", "n_heads": 4, "window": 7},
    "selector": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "selector": {"name": "dsa", "top_k": 5}},
    "composed": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "scores": {"name": "dcmha", "rank": 1, "width": 5}},
    "differential": {"name": "differential", "n_heads": 2},
}


@pytest.mark.parametrize(("attention", "position"), each(list(ATTENTIONS), list(POSITIONS)))
@torch.no_grad()
def test_caches_in_parts_equal_one_pass(attention: str, position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, absorbed, some heads at a time, on few keys gathered, and part by part; and after a rewind."""
    made, ids = decoder(ATTENTIONS[attention], POSITIONS[position]), tokens()
    right = made.hidden(ids)[0]
    for way in ("plain", "absorbed", "one head at a time", "few keys", "part by part"):
        with monkeypatch.context() as patch:
            patch.setattr(attending, "absorbs", lambda *_, way=way: way == "absorbed")
            if way == "one head at a time":
                patch.setattr(latent_attention, "KEPT", 0)
                patch.setattr(latent_attention, "EXPANDED", 1)
            for name in ("PART", "PART_OF_SEVERAL", "LEAST") if way == "few keys" else ():
                patch.setattr(few_keys, name, 1)
            if way == "part by part":
                made.choose_kernels({"attention": "blocked"})
                patch.setattr(biases, "suits", lambda T, S: 1 < T < S)
                patch.setattr(long_attention, "PARTS", (5, 11))
                patch.setattr(long_attention, "ROWS", 4)
            caches = made.new_caches(2, T)
            found = [made.hidden(some, caches=caches)[0] for some in ids[:, :34].split([20, 13, 1], 1)]
            marks = [cache.mark(4) for cache in caches]
            made.hidden(ids[:, 40:44], caches=caches)
            for cache, mark in zip(caches, marks, strict=True):
                cache.rewind(mark)
            found += [made.hidden(some, caches=caches)[0] for some in ids[:, 34:].split([1, 22], 1)]
        torch.testing.assert_close(torch.cat(found, 1), right, rtol=0, atol=1e-9, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("kernel", ["blocked", "sdpa"])
@torch.no_grad()
def test_kernels_agree_on_packed_documents(kernel: str) -> None:
    ids, segments = tokens(), (torch.arange(T) // 20)[None].expand(2, -1)
    places = (torch.arange(T) % 20)[None].expand(2, -1)
    for position in POSITIONS.values():
        made = decoder(ATTENTIONS["window"], position)
        right = made.choose_kernels({"attention": "reference"}).hidden(ids, places, segments)[0]
        found = made.choose_kernels({"attention": kernel}).hidden(ids, places, segments)[0]
        torch.testing.assert_close(found, right, rtol=0, atol=1e-9)


def test_long_sequences_make_no_bias_of_all_pairs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By blocks of queries, of which each has its part of the bias."""
    made, largest, of_part = decoder(ATTENTIONS["gqa"], BANDED).float(), [], Band.dense
    made.layers[0].attention.kernels = Kernels(attention="blocked")

    def noted(self: Band) -> Tensor:
        found = of_part(self)
        largest.append(found.shape[2])
        return found

    monkeypatch.setattr(Band, "dense", noted)
    with torch.no_grad():
        made.layers[0].attention(torch.randn(1, 400, D), Pass(torch.arange(400)[None]))
    assert max(largest) == 128 and len(largest) == 4


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("child", [{"position": "between"}, {"scores": "dcmha"}], ids=str)
def test_means_of_tokens_have_no_notes(make_block: Callable[..., Any], child: dict[str, Any]) -> None:
    node = {"name": "shared_kv", "n_heads": 4, "compressor": {"name": "hca"}, **child}
    with pytest.raises(ConfigError) as refused:
        make_block("attention", node)
    assert refused.value.path == f"model.attention.{next(iter(child))}" and "means of many" in str(refused.value)
    assert make_block("attention", {**node, "compressor": None}).new_cache(1, 8, torch.float32, torch.device("cpu"))


def test_attention_that_keeps_no_notes_is_named(make_block: Callable[..., Any]) -> None:
    position = make_block("position", "between", d_model=D, n_heads=4, head_dim=12)
    x, q, places = torch.randn(1, 5, D), torch.randn(1, 5, 4, 12), torch.arange(5)[None]
    with pytest.raises(BlockError, match="keeps no notes"):
        score_bias(position, Queries(x, q, places), Pass(places))


@pytest.mark.parametrize(
    ("kind", "node", "path"),
    [
        ("position", {"name": "banded", "rank": 0}, "rank"),
        ("position", {"name": "banded", "extent": 0}, "extent"),
        ("position", {"name": "log_scaled", "floor": 0}, "floor"),
        ("position", {"name": "log_scaled", "scale": -0.1}, "scale"),
        ("scores", {"name": "dcmha", "rank": 0}, "rank"),
        ("scores", {"name": "dcmha", "width": 0}, "width"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(
    make_block: Callable[..., Any], kind: str, node: dict[str, Any], path: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        make_block(kind, node, d_model=D, n_heads=4, head_dim=12)
    assert refused.value.path == f"model.{kind}.{path}"
