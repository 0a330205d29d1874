"""The wrapper for transformers: our logits and texts, whatever the padding; saved, loaded, recomputed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.generation.generate import Continuations
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder
from blockwright.plugins.hub.transformers import BlockwrightConfig, BlockwrightForCausalLM
from blockwright.plugins.hub.transformers_cache import BlockwrightCache
from blockwright.registry import BlockError, ConfigError

MLA = {"attention": {"name": "mla"}}
WINDOW = {"attention": {"name": "sliding_window", "window": 4}}
LEARNED = {"position": {"name": "learned"}, "tie_embeddings": True, "scale_embeddings": True, "logit_softcap": 3.0}
INDEXED = {"name": "csa", "every": 2, "n_heads": 2, "head_dim": 8, "top_k": 2}
MEANS = {"attention": {"name": "shared_kv", "window": 4, "compressor": INDEXED}}
KDA = {"attention": {"name": "kda", "n_heads": 2, "head_dim": 16}}
TOKENS = (torch.arange(24) * 7 % 61).view(2, 12)
HOLE = torch.tensor([[1] * 4 + [0] * 2 + [1] * 6] * 2)
Make = Callable[..., BlockwrightForCausalLM]


@pytest.mark.parametrize("changes", [WINDOW, LEARNED, MEANS])
def test_logits_are_ours_and_padding_on_either_side_is_not_seen(wrapped: Make, changes: dict[str, Any]) -> None:
    model = wrapped(**changes)
    alone = model.decoder(TOKENS[:1, :8])
    assert torch.equal(model(TOKENS[:1, :8]).logits, alone)
    mask = torch.ones_like(TOKENS)
    mask[0, 8:] = 0
    torch.testing.assert_close(model(TOKENS, attention_mask=mask).logits[:1, :8], alone)
    shifted = TOKENS.clone()
    shifted[0, 4:] = TOKENS[0, :8]
    torch.testing.assert_close(model(shifted, attention_mask=mask.flip(1)).logits[:1, 4:], alone)
    torch.testing.assert_close(model(shifted, attention_mask=mask.flip(1), logits_to_keep=2).logits[:1], alone[:, -2:])


@pytest.mark.parametrize("changes", [MLA, KDA])
def test_padding_does_not_join_documents_of_a_row(wrapped: Make, changes: dict[str, Any]) -> None:
    """Padding on the left, between documents, and on the right; or none."""
    model = wrapped(**changes)
    packed = model(TOKENS[:1], position_ids=torch.tensor([[*range(5), *range(7)]])).logits
    torch.testing.assert_close(packed[:, 5:], model.decoder(TOKENS[:1, 5:]), rtol=0, atol=1e-5)
    assert not torch.allclose(packed[:, 5:], model.decoder(TOKENS[:1])[:, 5:])
    positions = torch.tensor([[0, 0, 1, 2, 0, 1, 9, 0, 1, 2, 3, 4]])
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0]])
    positions[0, 1:4] = torch.arange(3)
    found = model(TOKENS[:1], attention_mask=mask, position_ids=positions).logits
    for part in (slice(1, 4), slice(4, 6), slice(7, 10)):
        torch.testing.assert_close(found[:, part], model.decoder(TOKENS[:1, part]), rtol=0, atol=1e-5)


def test_hidden_states_are_those_between_layers(wrapped: Make) -> None:
    model, seen = wrapped(**MLA), []
    model.decoder.layers[0].register_forward_hook(lambda _, given, out: seen.extend([given[0], out[0]]))
    found = model(TOKENS, output_hidden_states=True)
    last = model.decoder.hidden(TOKENS)[0]
    for one, other in zip(found.hidden_states, (*seen[:2], last), strict=True):
        torch.testing.assert_close(one, other)
    assert model(TOKENS).hidden_states is None
    assert len(model.model(TOKENS, output_hidden_states=True).hidden_states) == 3
    model.config.output_hidden_states = True
    assert len(model(TOKENS).hidden_states) == 3
    made = model.generate(TOKENS, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    assert [len(step) for step in made.hidden_states] == [3, 3]


def test_outputs_are_tuples_and_caches_are_returned_as_the_configuration_says(wrapped: Make) -> None:
    model, mask = wrapped(**MLA), torch.ones(2, 12).tril(5)
    assert model.config.use_cache and model(TOKENS).cache.get_seq_length() == 12
    assert model(TOKENS, use_cache=False).cache is None and model(TOKENS, attention_mask=mask).cache is None
    packed = torch.arange(6).repeat(2)[None]
    assert model(TOKENS, position_ids=packed).cache is None and model.train()(TOKENS).cache is None
    model.eval().config.use_cache = False
    assert model(TOKENS).cache is None and model(TOKENS, use_cache=True).cache is not None
    whole = model(TOKENS, labels=TOKENS)
    for more in ({"return_dict": False}, {}):
        model.config.return_dict = bool(more)
        for one, other in zip(model(TOKENS, labels=TOKENS, **more), (whole.loss, whole.logits), strict=True):
            torch.testing.assert_close(one, other)
        assert type(model.model(TOKENS, **more)) is tuple


def test_embeddings_are_replaced(wrapped: Make) -> None:
    model, other = wrapped(**MLA), torch.nn.Embedding(61, 48).double()
    before = model(TOKENS).logits
    model.set_input_embeddings(other)
    assert model.get_input_embeddings() is other and not torch.allclose(model(TOKENS).logits, before)
    torch.testing.assert_close(model(TOKENS).logits, model(inputs_embeds=other(TOKENS)).logits)
    head = torch.nn.Linear(48, 61, bias=False).double()
    model.set_output_embeddings(head)
    hidden = model.decoder.hidden(TOKENS)[0]
    torch.testing.assert_close(model(TOKENS).logits, head(hidden))
    with pytest.raises(BlockError, match="the head is the embedding"):
        wrapped(tie_embeddings=True).set_output_embeddings(head)


@pytest.mark.parametrize("changes", [WINDOW, KDA])
def test_text_is_continued_from_a_cache(wrapped: Make, changes: dict[str, Any]) -> None:
    """From copies of a prompt's cache, beyond the room it was made for, and with each row several times."""
    model, how = wrapped(**changes), {"do_sample": False, "return_dict_in_generate": True}
    mask = torch.ones_like(TOKENS)
    mask[0, :2] = 0
    whole = model.generate(TOKENS, attention_mask=mask, max_new_tokens=8, **how).sequences
    first = model.generate(TOKENS, attention_mask=mask, max_new_tokens=3, **how)
    assert first.cache.get_max_length() == 14
    for _ in range(2):
        cache = copy.deepcopy(first.cache)
        longer = torch.nn.functional.pad(mask, (0, 3), value=1)
        again = model.generate(first.sequences, attention_mask=longer, cache=cache, max_new_tokens=5, **how)
        assert torch.equal(again.sequences, whole) and cache.decoder is model.decoder
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert cache.batch_size == 2 and first.cache.get_seq_length() == 14


@pytest.mark.parametrize("changes", [{**LEARNED, "moe": False}, MEANS])
def test_generate_writes_our_texts_with_our_caches(wrapped: Make, changes: dict[str, Any]) -> None:
    """Rows of unequal length, padded on the left; and beams, which reorder the caches."""
    model = wrapped(**changes)
    prompts = [TOKENS[0, :6].tolist(), TOKENS[1, :3].tolist()]
    ours = list(zip(*Continuations(model.decoder, prompts, 6, Sampling(0.0)), strict=True))
    ids, mask = TOKENS[:, :6].clone(), torch.ones(2, 6, dtype=torch.int64)
    ids[1, 3:], mask[1, :3] = TOKENS[1, :3], 0
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert model.generate(ids, **given)[:, 6:].tolist() == [list(row) for row in ours]
    beams = [model.generate(ids, **given, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("changes", [MEANS])
def test_cache_of_unknown_length_grows(wrapped: Make, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockwright.plugins.hub.transformers_cache.AHEAD", 2)
    model, cache, steps = wrapped(**changes), None, []
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :2] = 0
    for i in (slice(0, 3), *(slice(n, n + 1) for n in range(3, 12))):
        found = model(TOKENS[:, i], attention_mask=mask[:, : i.stop], cache=cache, use_cache=True)
        cache, steps = found.cache, [*steps, found.logits]
    whole = model(TOKENS, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(steps, 1)[:, 2:], whole[:, 2:], rtol=0, atol=1e-5)  # gates are in fp32
    assert cache.get_seq_length() == 12


def test_saved_model_loads_without_remote_code_and_imports(wrapped: Make, tmp_path: Path) -> None:
    model = wrapped(**MLA).float()
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").composition == model.config.composition
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert import_folder(tmp_path / "saved", tmp_path / "imported") == "blockwright"
    torch.testing.assert_close(load(tmp_path / "imported")(TOKENS), model(TOKENS).logits)
    export_folder(tmp_path / "imported", tmp_path / "exported", family="blockwright")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(exported(TOKENS).logits, model(TOKENS).logits)


def test_text_of_a_composition_is_a_configuration(tmp_path: Path) -> None:
    text = "{vocab_size: 8, d_model: 8, n_layers: 1, attention: {name: gqa, n_heads: 2}, position: rope, ffn: swiglu, "
    text += "norm: rmsnorm, residual: prenorm}"
    config = BlockwrightConfig(text)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (8, 8, 1)
    with pytest.raises(ConfigError, match="_target_"):
        BlockwrightConfig(text.replace("ffn: swiglu", "ffn: {_target_: os.system}"))


def test_loss_is_the_mean_over_labels_and_balance_where_asked(wrapped: Make) -> None:
    model = wrapped(**MLA)
    labels = TOKENS.masked_fill(TOKENS % 3 == 0, -100)
    hidden, routings = model.decoder.hidden(TOKENS)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    nll, n = model.decoder.nll(hidden, shifted), (shifted != -100).sum()
    close = partial(torch.testing.assert_close, check_dtype=False, atol=1e-5, rtol=0)  # transformers counts in fp32
    close(model(TOKENS, labels=labels).loss, nll / n)
    close(model(TOKENS, labels=labels, num_items_in_batch=5).loss, nll / 5)
    balance = sum(v for r in routings if r is not None for v in r.losses.values())
    (nll / n + balance).backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.config.balance_losses = True
    model(TOKENS, labels=labels).loss.backward()
    for found, expected in zip((p.grad for p in model.parameters()), wanted, strict=True):
        close(found, expected)
    gate = model.decoder.layers[1].ffn.gating.weight
    model.zero_grad()
    model.config.balance_losses = False
    model(TOKENS, labels=labels).loss.backward()
    assert not torch.allclose(gate.grad, wanted[[id(p) for p in model.parameters()].index(id(gate))], atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_in_no_load_and_no_balance_loss(wrapped: Make, side: str) -> None:
    model, seen = wrapped(**MLA).train(), []
    model.decoder.layers[1].ffn.gating.register_forward_hook(lambda gate, given, routing: seen.append(routing))
    model(TOKENS[:, :8])
    mask, by = (torch.arange(12) < 8).long().repeat(2, 1), 4 if side == "left" else 0
    model(TOKENS.roll(by, 1), attention_mask=mask.roll(by, 1))
    plain, among = seen
    assert torch.equal(among.load, plain.load) and plain.losses
    torch.testing.assert_close(among.losses, plain.losses)


def test_recomputed_activations_give_the_same_gradient(wrapped: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = wrapped(**MLA).train(), []
    inner = type(model.decoder.layers[0].ffn).forward
    monkeypatch.setattr(type(model.decoder.layers[0].ffn), "forward", lambda *a: calls.append(1) or inner(*a))

    def gradient() -> list[torch.Tensor]:
        model.zero_grad()
        model(TOKENS, labels=TOKENS, use_cache=True).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain, once = gradient(), len(calls)
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) > 2 * once
    model.gradient_checkpointing_disable()
    calls.clear()
    gradient()
    assert len(calls) == once


PACKED, WAVES = torch.arange(6).repeat(2)[None], torch.ones(2, 12).tril(5)
REFUSED: list[dict[str, Any]] = [  # besides the tokens
    {"input_ids": None},
    *({"attention_mask": mask} for mask in (torch.ones(2, 1, 12, 12), torch.ones(2, 11), HOLE)),
    {"attention_mask": torch.arange(12).repeat(2, 1) // 4},
    *({"attention_mask": mask, "use_cache": True} for mask in (WAVES, HOLE)),
    {"attention_mask": HOLE, "position_ids": torch.arange(12)[None]},
    {"position_ids": PACKED, "use_cache": True},
    {"cache": ()},
    {"output_attentions": True},
    {"output_router_logits": True},
    {"is_causal": False},
    {"cu_seq_lens_q": torch.tensor([0, 12])},
    {"atention_mask": torch.ones(2, 12)},
]


def test_what_is_not_supported_is_refused(wrapped: Make) -> None:
    model = wrapped()
    for given in REFUSED:
        with pytest.raises(BlockError):
            pytest.fail(f"{given}: {model(**{'input_ids': TOKENS, **given})}")
    model.config._attn_implementation = "eager"  # transformers itself refuses maps of other kernels
    for setting in ("output_attentions", "output_router_logits"):
        setattr(model.config, setting, True)
        with pytest.raises(BlockError):
            model(TOKENS)
        setattr(model.config, setting, False)
    for kind in ("static", "quantized"):
        with pytest.raises(BlockError):
            model.generate(TOKENS, cache_implementation=kind, max_new_tokens=1)
    for act in (lambda: BlockwrightCache(model.decoder).crop(1), lambda: model.resize_token_embeddings(70)):
        with pytest.raises(BlockError):
            act()


def test_later_call_cannot_change_what_a_cache_holds(wrapped: Make) -> None:
    model = wrapped(**MLA)
    cache, mask = model(TOKENS[:, :8], use_cache=True).cache, torch.ones(2, 10)
    later = {"input_ids": TOKENS[:, 8:10], "cache": cache}
    for given in (
        {"attention_mask": torch.arange(10).clamp(max=1).repeat(2, 1)},
        {"attention_mask": mask[:, 8:]},
        {"position_ids": torch.arange(2)[None]},
    ):
        with pytest.raises(BlockError):
            model(**later, **given)
    assert model(**later, attention_mask=mask, position_ids=torch.arange(8, 10)[None]).logits.shape[1] == 2
    model.train().gradient_checkpointing_enable()
    with pytest.raises(BlockError):  # it would be written twice
        model(**later)
