"""The wrapper for transformers: our logits and texts, whatever the padding; saved, loaded, recomputed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from blocks.generation.generate import Continuations
from blocks.generation.sample import Sampling
from interop.exporting import export_folder
from interop.importing import import_folder
from interop.source import load
from interop.transformers import BlockwrightConfig, BlockwrightForCausalLM
from interop.transformers_cache import BlockwrightCache
from registry import BlockError, ConfigError

MLA = {"attention": {"name": "mla"}}
WINDOW = {"attention": {"name": "sliding_window", "window": 4}}
LEARNED = {"position": {"name": "learned"}, "tie_embeddings": True, "scale_embeddings": True, "logit_softcap": 3.0}
INDEXED = {"name": "csa", "every": 2, "n_heads": 2, "head_dim": 8, "top_k": 2}
MEANS = {"attention": {"name": "shared_kv", "window": 4, "compressor": INDEXED}}
TOKENS = (torch.arange(24) * 7 % 61).view(2, 12)
Make = Callable[..., BlockwrightForCausalLM]


@pytest.mark.parametrize("changes", [MLA, WINDOW, LEARNED, MEANS])
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


def test_documents_packed_in_a_row_do_not_see_each_other(wrapped: Make) -> None:
    model = wrapped(**MLA)
    positions = torch.tensor([[*range(5), *range(7)]])
    packed = model(TOKENS[:1], position_ids=positions).logits
    torch.testing.assert_close(packed[:, 5:], model.decoder(TOKENS[:1, 5:]))
    assert not torch.allclose(packed[:, 5:], model.decoder(TOKENS[:1])[:, 5:])


@pytest.mark.parametrize("changes", [MLA, WINDOW, LEARNED, MEANS])
def test_generate_writes_our_texts_with_our_caches(wrapped: Make, changes: dict[str, Any]) -> None:
    """Rows of unequal length, padded on the left; and beams, which reorder the caches."""
    model = wrapped(**changes)
    prompts = [TOKENS[0, :6].tolist(), TOKENS[1, :3].tolist()]
    ours = list(zip(*Continuations(model.decoder, prompts, 9, Sampling(0.0)), strict=True))
    ids, mask = TOKENS[:, :6].clone(), torch.ones(2, 6, dtype=torch.int64)
    ids[1, 3:], mask[1, :3] = TOKENS[1, :3], 0
    given = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert model.generate(ids, **given)[:, 6:].tolist() == [list(row) for row in ours]
    beams = [model.generate(ids, **given, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("changes", [MLA, MEANS])
def test_cache_of_unknown_length_grows(wrapped: Make, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interop.transformers_cache.AHEAD", 2)
    model, cache, steps = wrapped(**changes), None, []
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :2] = 0
    for i in (slice(0, 3), *(slice(n, n + 1) for n in range(3, 12))):
        found = model(TOKENS[:, i], attention_mask=mask[:, : i.stop], cache=cache, use_cache=True)
        cache, steps = found.cache, [*steps, found.logits]
    whole = model(TOKENS, attention_mask=mask).logits
    torch.testing.assert_close(torch.cat(steps, 1)[:, 2:], whole[:, 2:])
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


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "either input_ids or inputs_embeds"),
    ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 12, 12)}, "must be"),
    ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 12).tril(5), "use_cache": True}, "padded on the left"),
    ({"input_ids": TOKENS, "cache": ()}, "must be a BlockwrightCache"),
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_is_not_supported_is_refused(wrapped: Make, given: dict[str, Any], words: str) -> None:
    with pytest.raises(BlockError, match=words):
        wrapped()(**given)


def test_cache_that_cannot_forget_says_so(wrapped: Make) -> None:
    with pytest.raises(BlockError, match="neither forget"):
        BlockwrightCache(wrapped().decoder).crop(1)
    with pytest.raises(BlockError, match="vocabulary is part"):
        wrapped().resize_token_embeddings(70)
