"""Full batches of caches, and comparisons of what was measured in one round."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairwise import each, pairs

from benchmarks import equal_memory
from benchmarks.equal_memory import Cell, FullBatch, Raced, against, allocated, claims, tabulate
from benchmarks.record import Table
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import Continuations, prefill
from blockwright.blocks.generation.sample import Sampling
from blockwright.registry import ConfigError

LOAD = (1.0, 2.0, 1.5)  # how much slower each round is for all


def raced(rows: int, seconds: float, bytes_of_one: int) -> Raced:
    plan: Any = SimpleNamespace(least_seconds=seconds / 4, tokens_per_second=2 * rows / seconds)
    return Raced(rows, bytes_of_one, {n: rows / seconds / load for n, load in enumerate(LOAD)}, plan)


FOUND = {
    Cell("mha", None, 64): raced(4, 1.0, 800),
    Cell("mla", None, 64): raced(8, 1.0, 400),
    Cell("mha", 6, 64): raced(12, 6.0, 200),
    Cell("mla", 6, 64): raced(32, 2.0, 100),
}


def test_each_comparison_changes_one_thing_or_both() -> None:
    first, other = Cell("mha", None, 64), Cell("mla", 6, 64)
    assert against(first, "mha", None) == {}
    assert against(Cell("mla", None, 64), "mha", None) == {"architecture": first}
    assert against(Cell("mha", 6, 64), "mha", None) == {"bits": first}
    assert against(other, "mha", None) == {
        "architecture": Cell("mha", 6, 64),
        "bits": Cell("mla", None, 64),
        "both": first,
    }


def test_ratios_are_of_the_same_round_and_the_roofline_of_the_same_rows() -> None:
    (batches, compared), ratios = tabulate(FOUND, "mha", None)
    spreads = {ratio.name.partition(" ·")[0]: ratio.spread for ratio in ratios}
    of = spreads["mla, exact ÷ mha, exact"]
    assert (of.median, of.q1, of.q3) == (2.0, 2.0, 2.0)  # all rounds are equally slow for both
    assert spreads["mha, 6 bits ÷ mha, exact"].median == pytest.approx(0.5)
    steps = spreads["mla, 6 bits ÷ mha, 6 bits"].median * spreads["mha, 6 bits ÷ mha, exact"].median
    assert spreads["mla, 6 bits ÷ mha, exact"].median == pytest.approx(steps) == 4.0
    assert ["mla, 6 bits", "mha, 6 bits", "architecture", 64, "50.0%", 32 / 12, 8.0] in compared.rows
    shares = [row[list(batches.columns).index("of the roofline")] for row in batches.rows]
    assert shares == [pytest.approx(0.25 / 1.5)] * len(FOUND)


@pytest.mark.slow
def test_the_plan_of_the_papers_node_is_near_its_claim() -> None:
    claim, both, architecture, bits = claims().rows
    assert claim[1:] == ["93.3%", None, 5.76]
    assert both[3] == pytest.approx(claim[3], rel=0.1) and both[1] == "93.1%"
    assert both[3] == pytest.approx(architecture[3] * bits[3]) and architecture[1] == "82.2%"


KDA = {"name": "kda", "n_heads": 3, "head_dim": 8}
MLA = {"attention": {"name": "mla", "n_heads": 3}}
HYBRID = {**MLA, "variants": {"attention": {"linear": KDA}}, "layout": {"attention": "linear attention"}}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"attention": {"name": "mha", "n_heads": 3}},
    "gqa": {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 2}},
    "mla": MLA,
    "window": {"attention": {"name": "sliding_window", "n_heads": 3, "n_kv_heads": 3, "window": 7}},
    "kda": {"attention": KDA},
    "hybrid": HYBRID,
}
CONTEXT = 37
PROMPT = CONTEXT - equal_memory.STEPS - 1


def build(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    plain = {"variants": None, "layout": None, "gating": None, "experts": None}
    sizes = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "ffn": {"name": "swiglu", "d_ff": 20}}
    return compose(preset("tiny", {**plain, **sizes, **MODELS[name]})).to(dtype).eval()


def batch(name: str, bits: int | None, memory: int = 100_000, rows: int | None = None, **more: Any) -> FullBatch:
    return FullBatch(build(name, **more), Cell(name, bits, CONTEXT), memory, rows)


def again(full: FullBatch) -> FullBatch:
    """The same batch, before it has drawn anything."""
    full.draws.manual_seed(0)
    return full


@pytest.mark.parametrize(("name", "bits"), each(list(MODELS), [None, 8, 6, 4]))
def test_as_many_rows_as_fit_and_no_more(name: str, bits: int | None) -> None:
    full = batch(name, bits)
    assert full.rows * full.row_bytes <= 100_000 < (full.rows + 1) * full.row_bytes
    assert allocated(full.caches()) == full.rows * full.row_bytes
    assert full.turn() > 0


def test_rows_are_limited_by_what_is_chosen_too() -> None:
    assert batch("gqa", None, rows=3).rows == 3
    assert batch("gqa", None, rows=10_000).rows == batch("gqa", None).rows
    with pytest.raises(ConfigError, match="less than the caches of one sequence take"):
        batch("gqa", None, memory=1000)


def test_bytes_are_those_of_the_memory_behind_views() -> None:
    whole, other = torch.zeros(4, 5), torch.zeros(7)
    views: Any = SimpleNamespace(buffers={"first": whole[:1], "last": whole[3:], "other": other[2:3]})
    assert allocated([views, views]) == whole.nbytes + other.nbytes


@pytest.mark.parametrize(("name", "bits", "dtype"), pairs(list(MODELS), [None, 6], [torch.float32, torch.bfloat16]))
@torch.inference_mode()
def test_every_row_decodes_what_it_would_alone(name: str, bits: int | None, dtype: torch.dtype) -> None:
    off = 1e-5 if dtype == torch.float32 else 3e-2
    full = batch(name, bits, rows=3, dtype=dtype)
    prompt = FullBatch._tokens(again(full), 1, PROMPT)
    tokens = torch.tensor([[5], [11], [60]])
    together = prefill(full.decoder, tokens, full.caches())
    for row, token in enumerate(tokens):
        alone = full.decoder.new_caches(1, CONTEXT, bits)
        prefill(full.decoder, prompt, alone)
        expected = prefill(full.decoder, token[None], alone)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=off, atol=off)


def test_steps_are_those_of_greedy_decoding() -> None:
    full = batch("hybrid", None, rows=1)
    prompt = again(full)._tokens(1, PROMPT)[0].tolist()
    greedy = Continuations(full.decoder, [prompt], equal_memory.STEPS + 1, Sampling(temperature=0))
    expected = [tokens[0] for tokens in greedy]
    with torch.inference_mode():
        caches, token = full.caches(), torch.tensor([[expected[0]]])
        for later in expected[1:]:
            token = full.step(token, caches)
            assert token.item() == later


def test_a_turn_fills_its_caches_and_leaves_the_prompt_as_it_was() -> None:
    full = batch("mla", None, rows=2)
    before = [{name: held.clone() for name, held in cache.buffers.items()} for cache in full._one]
    lengths: list[int] = []
    step = full.step
    full.step = lambda tokens, caches: (step(tokens, caches), lengths.append(caches[0].length))[0]  # type: ignore[method-assign]
    full.turn()
    full.turn()
    assert lengths == [*range(PROMPT + 1, CONTEXT + 1)] * 2
    for cache, old in zip(full._one, before, strict=True):
        for name, held in cache.buffers.items():
            assert torch.equal(held, old[name])


def test_arms_alternate_from_command_line_to_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    turn = FullBatch.turn

    def noted(self: FullBatch) -> float:
        turns.append(type(self.decoder.layers[0].attention).__name__)
        return turn(self)

    monkeypatch.setattr(FullBatch, "turn", noted)
    monkeypatch.setattr(equal_memory, "claims", lambda: Table("The paper's claim", ()))  # of large models
    monkeypatch.setattr(equal_memory, "multiply_fastest", lambda *decoders: None)
    threads = torch.get_num_threads()
    words = "model=tiny model.d_model=32 model.n_layers=1 model.layout=null model.variants=null model/attention=mha,mqa"
    options = [
        "--memory",
        "1",
        "--bits",
        "null",
        "--contexts",
        "16",
        "--rounds",
        "3",
        "--rows",
        "2",
        "--out",
        str(tmp_path),
    ]
    equal_memory.main([*words.split(), *options])
    torch.set_num_threads(threads)
    assert turns == ["MHA", "MQA", "MQA", "MHA", "MHA", "MQA"]
    made = json.loads((tmp_path / "equal_memory.json").read_text())
    assert [ratio["name"] for ratio in made["ratios"]] == ["mqa, exact ÷ mha, exact · 16 tokens: tokens/s"]
    assert len(made["tables"][0]["rows"]) == 2
    with pytest.raises(SystemExit, match="is longer than arm"):
        equal_memory.main([*words.split(), "--contexts", "1000000"])
