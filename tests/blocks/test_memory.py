"""Memories by token: parity with transformers, and how a layer, a cache and a cost card treat them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright.blocks.cache.layer import LayerCache
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import count_parameters, forward_flops_per_token
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.memory import Engram, PerLayerEmbedding, last_tokens, primes_from
from blockwright.blocks.norm import RMSNorm
from blockwright.registry import BlockError
from tests.blocks.small import in_parts, near, order, rewind
from tests.blocks.small import model as small

V, D, END = 53, 24, 5
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}
TINY = small(vocab_size=V, d_model=D, n_layers=3, init={"std": 0.3})
ENGRAM = {"name": "engram", "rows": 31, "n_heads": 2, "width": 12, "end": END}


def tokens(rows: int = 3, length: int = 17) -> Tensor:
    found = torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(3))
    found[:, [4, 11]] = END
    return found


def model(**more: Any) -> Decoder:
    return compose({**TINY, **more}).double().eval()


@pytest.fixture
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' norms, which compute in fp32, leave fp64 as it is."""
    lowered = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda t: t if t.dtype == torch.float64 else lowered(t))


def assert_near(pairs: dict[str, tuple[Tensor, Tensor]], bound: float) -> None:
    off = {n: float((a - b).detach().abs().max() / b.detach().abs().max()) for n, (a, b) in pairs.items()}
    assert max(off.values()) < bound, off


def qwen4_exp(streams: int, ordinal: int, dtype: torch.dtype) -> Any:
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextPLELayer

    sizes = {"hidden_size": D, "hc_count": streams, "ple_embed_dim": 18, "ple_conv_kernel_size": 3, "vocab_size": V}
    grams = {"ngram_size": 4, "heads_per_ngram": 2, "ngram_vocab_size_base": 29, "eos_token_id": END, "seed": 7}
    grams |= {"make_ngram_vocab_size_divisible_by": 1, "rms_norm_eps": 1e-6}
    config = SimpleNamespace(**sizes, **grams)
    theirs = Qwen4ExpTextPLELayer(config, 5, ordinal)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    return theirs.to(dtype)


def engram_of(theirs: Any, streams: int, ordinal: int, dtype: torch.dtype) -> Engram:
    norms = RMSNorm(D), RMSNorm(D)
    settings = {"rows": 29, "width": 18, "n_heads": 2, "ngram": 4, "taps": 3, "end": END, "seed": 7}
    ours = Engram(D, V, streams, 5, *norms, ordinal=ordinal, **settings).to(dtype)
    with torch.no_grad():
        ours.table.weight.copy_(theirs.ple_embedding.ngram_embedding.weight)
        ours.key.weight.copy_(theirs.key_proj.weight)
        ours.value.weight.copy_(theirs.value_proj.weight)
        for own, name in ((ours.key_norms, "norm_key"), (ours.query_norms, "norm_query")):
            for norm, gain in zip(own, getattr(theirs, name).weight.view(streams, D), strict=True):
                norm.weight.copy_(1 + gain)
        ours.smooth.weight.copy_(theirs.conv1d.weight[:, 0] * (1 + theirs.norm_conv.weight)[:, None])
    return ours


@pytest.mark.parametrize(("streams", "ordinal", "dtype"), [(1, 0, torch.float32), (3, 2, torch.float64)], ids=str)
def test_engram_computes_what_qwen4_exp_does(
    streams: int, ordinal: int, dtype: torch.dtype, whole_precision: None
) -> None:
    torch.manual_seed(0)
    theirs, ids = qwen4_exp(streams, ordinal, dtype), tokens()
    ours = engram_of(theirs, streams, ordinal, dtype)
    x = torch.randn(*ids.shape, streams * D, dtype=dtype, requires_grad=True)
    y = x.detach().unflatten(-1, (streams, D)).requires_grad_()
    right, weigh = theirs(x, ids, None), torch.randn(*ids.shape, streams * D, dtype=dtype)
    found = ours(y if streams > 1 else y[:, :, 0], Pass(order(ids.shape[1]), tokens=ids))
    (right * weigh).sum().backward()
    (found.reshape(right.shape) * weigh).sum().backward()
    pairs = {
        "output": (found.reshape(right.shape), right),
        "x": (y.grad.flatten(2), x.grad),
        "table": (ours.table.weight.grad.to_dense(), theirs.ple_embedding.ngram_embedding.weight.grad),
        "key": (ours.key.weight.grad, theirs.key_proj.weight.grad),
        "value": (ours.value.weight.grad, theirs.value_proj.weight.grad),
        "gain": (torch.cat([n.weight.grad for n in ours.query_norms]), theirs.norm_query.weight.grad),
        "taps": (ours.smooth.weight.grad * (1 + theirs.norm_conv.weight)[:, None], theirs.conv1d.weight.grad[:, 0]),
    }
    assert_near(pairs, BOUND[dtype])


def test_engram_gives_packed_documents_what_qwen4_exp_gives_each_alone(whole_precision: None) -> None:
    torch.manual_seed(0)
    theirs = qwen4_exp(1, 1, torch.float64)
    ours, lengths = engram_of(theirs, 1, 1, torch.float64), (5, 1, 7, 4)
    ids, x = tokens(1), torch.randn(1, 17, D, dtype=torch.float64)
    segments = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = ours(x, Pass(torch.arange(17)[None], segments, tokens=ids))
    documents = zip(packed.split(lengths, 1), x.split(lengths, 1), ids.split(lengths, 1), strict=True)
    for found, states, own in documents:
        near(found, theirs(states, own, None), 1e-12, 1e-12)


@torch.no_grad()
def test_engram_without_taps_is_the_gated_value_of_deepseek_v4_1() -> None:
    """Their gate has one gain for key and state, and no convolution follows."""
    node = {**ENGRAM, "ngram": 4, "taps": None, "ordinal": 0}
    decoder = model(memory=node, residual={"name": "mhc", "n_streams": 3})
    ours: Any = decoder.layers[1].memory
    for norm in (*ours.key_norms, *ours.query_norms):
        norm.weight.normal_()
    ids, x = tokens(1), torch.randn(1, 17, 3, D, dtype=torch.float64)
    e = ours._recall(Pass(order(17), tokens=ids), None)[0]
    found = ours(x, Pass(order(17), tokens=ids))
    for t in range(17):
        value, keys = ours.value.weight @ e[0, t], (ours.key.weight @ e[0, t]).view(3, D)
        for stream, key, both in zip(x[0, t], keys, zip(ours.key_norms, ours.query_norms, strict=True), strict=True):
            gain = both[0].weight * both[1].weight
            scale = (stream.square().mean() + 1e-6).rsqrt() * (key.square().mean() + 1e-6).rsqrt() * D**-0.5
            dot = (stream * gain * key).sum() * scale
            want = torch.copysign(dot.abs().clamp_min(1e-6).sqrt(), dot).sigmoid() * value
            near(found[0, t, [torch.equal(stream, s) for s in x[0, t]].index(True)], want, 1e-12)
    near(in_parts(decoder, ids, [5, 1, 1, 10]), decoder.hidden(ids)[0], 1e-10)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_a_per_layer_embedding_computes_what_gemma4_does(dtype: torch.dtype, whole_precision: None) -> None:
    from transformers import Gemma4TextConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextModel

    torch.manual_seed(0)
    sizes = {"vocab_size": V, "vocab_size_per_layer_input": V, "hidden_size": D, "hidden_size_per_layer_input": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12, "global_head_dim": 12}
    depth = {"num_hidden_layers": 2, "num_kv_shared_layers": 0, "intermediate_size": 20}
    theirs = Gemma4TextModel(Gemma4TextConfig(**sizes, **heads, **depth, attn_implementation="eager")).to(dtype)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer, P, at = theirs.layers[1], 9, slice(9, 18)  # √9 is exact: theirs is a buffer in fp32
    nn.init.zeros_(layer.self_attn.o_proj.weight)  # their layer then adds what is tested, and nothing else
    nn.init.zeros_(layer.mlp.down_proj.weight)
    ours = PerLayerEmbedding(D, V, RMSNorm(P), RMSNorm(D), width=P).to(dtype)
    with torch.no_grad():
        ours.table.weight.copy_(theirs.embed_tokens_per_layer.weight[:, at])
        ours.project.weight.copy_(theirs.per_layer_model_projection.weight[at])
        ours.embedded_norm.weight.copy_(theirs.per_layer_projection_norm.weight)
        ours.gate.weight.copy_(layer.per_layer_input_gate.weight)
        ours.output.weight.copy_(layer.per_layer_projection.weight)
        ours.output_norm.weight.copy_(layer.post_per_layer_input_norm.weight)
    ids = tokens()
    embedded = theirs.embed_tokens(ids).detach()
    x = torch.randn(*ids.shape, D, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    rows = theirs.project_per_layer_inputs(embedded, theirs.get_per_layer_inputs(ids))[:, :, 1]
    positions = torch.arange(ids.shape[1])[None]
    angles = theirs.rotary_emb(x, positions, theirs.config.layer_types[1])
    right = layer(x, rows, shared_kv_states={}, position_embeddings=angles, position_ids=positions) - x
    found = ours(y, Pass(positions, tokens=ids, embedded=embedded))
    weigh = torch.randn_like(right)
    (right * weigh).sum().backward()
    (found * weigh).sum().backward()
    pairs = {
        "output": (found, right),
        "x": (y.grad, x.grad),
        "table": (ours.table.weight.grad.to_dense(), theirs.embed_tokens_per_layer.weight.grad[:, at]),
        "gate": (ours.gate.weight.grad, layer.per_layer_input_gate.weight.grad),
        "context": (ours.project.weight.grad, theirs.per_layer_model_projection.weight.grad[at]),
    }
    assert_near(pairs, BOUND[dtype])


def test_n_grams_are_those_of_a_loop_over_documents() -> None:
    ids, segments = tokens(2, 13), torch.tensor([[0] * 6 + [1] * 7, [0] * 9 + [-1] * 4])
    history = torch.cat((torch.zeros(2, 2, dtype=torch.int64), ids + 1), 1)
    found = torch.stack(last_tokens(history, segments, 3, END), -1)
    for row in range(2):
        for t in range(13):
            want = [int(ids[row, t])]
            for lag in (1, 2):
                ended = any(ids[row, t - k] == END for k in range(1, lag + 1) if t >= k)
                other = t < lag or segments[row, t - lag] != segments[row, t]
                want.append(-1 if ended or other else int(ids[row, t - lag]))
            assert found[row, t].tolist() == want, (row, t)


def test_primes_are_consecutive_and_distinct_over_memories() -> None:
    slow = [n for n in range(1000, 1400) if all(n % k for k in range(2, 38))]
    assert [*primes_from(1000, 0, 5), *primes_from(1000, 5, 20)] == slow[:25]
    assert primes_from(2, 0, 6) == (2, 3, 5, 7, 11, 13)


def test_a_layout_and_overrides_say_which_layers_have_one() -> None:
    variants = {"memory": {"without": None, "narrow": {"width": 4}}}
    some = model(memory=ENGRAM, variants=variants, layout={"memory": "without memory narrow"})
    assert [layer.memory and layer.memory.table.weight.shape[1] for layer in some.layers] == [None, 3, 1]
    last = model(overrides=[{"layers": -1, "memory": ENGRAM}])
    assert [layer.memory is None for layer in last.layers] == [True, True, False]
    assert len(set(some.layers[1].memory.primes) | set(some.layers[2].memory.primes)) == 8


@pytest.mark.parametrize("memory", [ENGRAM, {"name": "per_layer_embedding", "width": 4}], ids=lambda m: m["name"])
@torch.no_grad()
def test_it_reads_prompts_in_parts_and_is_rewound_across_ends_of_documents(memory: dict[str, Any]) -> None:
    decoder, ids, padding = model(memory=memory), tokens(), torch.tensor([0, 3, 5])
    caches = decoder.new_caches(3, 17, padding=padding)
    found = [in_parts(decoder, ids[:, :9], [4, 1, 4], caches)]
    marks = [cache.mark(3) for cache in caches]
    decoder(ids[:, 9:12], caches=caches)
    rewind(caches, marks, 1)
    kept = torch.cat([*found, in_parts(decoder, ids[:, 10:], [1, 6], caches)], 1)
    for row, n in enumerate(padding.tolist()):
        whole = decoder.hidden(ids[row : row + 1, n:])[0]
        torch.testing.assert_close(kept[row : row + 1, n:9], whole[:, : 9 - n])
        torch.testing.assert_close(kept[row : row + 1, 9:], whole[:, 10 - n :])
    assert isinstance(caches[0], LayerCache) == (memory is ENGRAM)
    if memory is ENGRAM:
        with pytest.raises(BlockError, match="ids"):
            decoder.layers[0].memory(torch.zeros(1, 3, D, dtype=torch.float64), Pass(order(3)))


def test_a_card_counts_of_tables_the_rows_that_a_token_reads_and_the_flops_of_products() -> None:
    dense, with_it = (count_parameters(compose({**TINY, **more}, device="meta")) for more in ({}, {"memory": ENGRAM}))
    rows = sum(sum(primes_from(31, 4 * i, 4)) for i in range(3))
    assert with_it.tables == 3 * rows and not dense.tables
    matrices = 3 * (12 * D * 2 + 2 * D + D * 4)  # keys and values, gains, taps
    assert with_it.total == dense.total + with_it.tables + matrices
    assert with_it.active == dense.active + 3 * 12 + matrices
    assert with_it.families["memory"] == with_it.total - dense.total
    assert count_parameters(compose({**TINY, "memory": ENGRAM})) == with_it
    flops = [forward_flops_per_token({**TINY, **more}, 16) for more in ({}, {"memory": ENGRAM})]
    assert flops[1] - flops[0] == 3 * 2 * 2 * 12 * D
