"""Tokenizers: text survives, eos is out of reach of any text, bytes add up, the state is plain JSON."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.registry.errors import ConfigError
from blockwright.training.data.tokenizers import bpe as bpe_module
from blockwright.training.data.tokenizers.base import Tokenizer, token_dtype
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.data.tokenizers.rebuild import KINDS, rebuild

ROOT = Path(__file__).parents[3]
TEXTS = [
    "To be, or not to be: that is the question.\n\n" * 20,
    "Whether 'tis nobler in the mind — to suffer\n\n\n" * 20,
]
SPELLED = "<|endoftext|> <unk> </s> <eos> [EOS]"


def fitted(kind: str) -> Tokenizer:
    tokenizer = {"bytes": Bytes(300), "chars": Chars(64), "bpe": BPE(320)}[kind]
    tokenizer.fit(TEXTS)
    return tokenizer


@pytest.fixture(scope="module", params=("bpe", "bytes", "chars"))
def tokenizer(request) -> Tokenizer:
    return fitted(request.param)


@pytest.fixture(scope="module")
def bpe() -> BPE:
    return fitted("bpe")


def test_the_train_text_survives(tokenizer):
    for text in [*TEXTS, ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_within_the_vocabulary_and_never_eos(tokenizer):
    ids = tokenizer.encode(TEXTS[0] + SPELLED)
    assert ids.dtype == token_dtype(tokenizer.vocab_size) and ids.ndim == 1
    assert ids.max() < tokenizer.vocab_size and tokenizer.eos < tokenizer.vocab_size
    assert tokenizer.eos not in ids


def test_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer):
    n_bytes = tokenizer.token_bytes()
    assert n_bytes.shape == (tokenizer.vocab_size,) and n_bytes[tokenizer.eos] == 0
    for text in TEXTS:
        assert n_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_decoding_never_fails(tokenizer):
    assert tokenizer.decode([tokenizer.eos]) == ""
    assert isinstance(tokenizer.decode(np.arange(-100, tokenizer.vocab_size + 100)), str)
    assert tokenizer.decode([]) == ""


def test_the_state_rebuilds_the_tokenizer_from_plain_json_and_in_another_process(tokenizer):
    for again in (rebuild(json.loads(json.dumps(tokenizer.to_json()))), pickle.loads(pickle.dumps(tokenizer))):
        assert type(again) is type(tokenizer) and again.fitted and again.eos == tokenizer.eos
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.encode(TEXTS[1]).tolist() == tokenizer.encode(TEXTS[1]).tolist()
        assert (again.token_bytes() == tokenizer.token_bytes()).all()


def test_what_is_unfitted_says_so_and_stays_so_in_its_state():
    for kind in ("chars", "bpe"):
        blank = KINDS[kind](300)
        assert not blank.fitted and not rebuild(blank.to_json()).fitted
        with pytest.raises(RuntimeError, match="call fit"):
            blank.encode("a")


def test_the_fingerprint_tells_vocabularies_apart(tokenizer):
    other = KINDS[tokenizer.kind](tokenizer.vocab_size + 1)
    other.fit(TEXTS)
    assert other.fingerprint() != tokenizer.fingerprint() == fitted(tokenizer.kind).fingerprint()


def test_an_unknown_kind_in_a_checkpoint_is_refused_and_one_of_a_plug_in_is_accepted():
    with pytest.raises(ConfigError):
        rebuild({"kind": "byte", "vocab_size": 257})
    assert isinstance(rebuild({"kind": "byte", "vocab_size": 257}, {"byte": Bytes}), Bytes)


@settings(max_examples=40)
@given(st.text())
def test_any_text_survives_as_bytes_and_as_bpe(bpe, text):
    for tokenizer in (Bytes(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos not in ids
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=40)
@given(st.text(alphabet=sorted(set("".join(TEXTS)))))
def test_text_of_known_characters_survives_as_chars(text):
    tokenizer = fitted("chars")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
def test_bpe_is_the_same_in_every_process(bpe):
    code = "from blockwright.training.data.tokenizers.bpe import BPE; "
    code += f"b = BPE(320); b.fit({TEXTS!r}); print(b.fingerprint())"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert out.strip() == bpe.fingerprint()


def test_bpe_merges_and_a_small_corpus_leaves_ids_unused_and_keeps_eos_last(bpe):
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    tokenizer = BPE(4096)
    tokenizer.fit(["aa aa"])
    assert tokenizer.eos == 4095 and tokenizer.token_bytes()[-1] == 0
    assert tokenizer.decode(tokenizer.encode("zebra")) == "zebra"


def test_a_character_unseen_in_training_is_unknown_and_counts_as_a_byte():
    tokenizer = fitted("chars")
    assert tokenizer.encode("Zé").tolist() == [0, 0] and tokenizer.decode([0]) == "\ufffd"
    assert tokenizer.token_bytes()[0] == 1


def test_a_vocabulary_too_small_is_refused():
    need = len(set("".join(TEXTS))) + 2
    Chars(need).fit(TEXTS)
    small = [lambda cls=cls, least=least: cls(least - 1) for cls, least in ((Bytes, 257), (BPE, 257), (Chars, 3))]
    for refuse in (lambda: Chars(need - 1).fit(TEXTS), lambda: Chars(need - 1).check(TEXTS), *small):
        with pytest.raises(ConfigError) as refused:
            refuse()
        assert refused.value.path == "data.tokenizer.vocab_size"
    assert Bytes(257) and BPE(257) and Chars(3)


def test_bpe_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError):
        BPE()


SPACED = st.text("ab \n\t\r1,.'\u4e00\u3002\u00e9\x1c\u00a0\u2028\ufeff", max_size=60)


@settings(max_examples=40)
@given(
    SPACED
    | st.lists(st.sampled_from(["to", " be", "\n", " ", "x", "'s", "1", "\t", ",", "."]), max_size=60).map("".join),
    st.integers(1, 7),
    st.integers(1, 9),
)
def test_a_document_in_parts_has_the_ids_of_the_whole(bpe, text, piece, part):
    for tokenizer in (Bytes(), fitted("chars"), bpe):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bpe_module, "PART", len(text) + 1)
            whole = tokenizer.encode(text).tolist()
            patch.setattr(bpe_module, "PART", part)
            parts = list(tokenizer.parts(text[i : i + piece] for i in range(0, len(text), piece)))
            assert [i for each in parts for i in tokenizer.encode(each).tolist()] == whole
            assert "".join(parts) == text and "" not in parts


def test_text_without_line_ends_is_cut_too():
    for text in ("one, two. " * 20_000, "one,two." * 20_000, "\u4e00\u4e01\u3002" * 50_000):
        assert max(map(len, BPE(300).parts([text]))) < bpe_module.PART + 20


def test_a_tokenizer_that_does_not_say_where_to_cut_gets_whole_documents():
    assert list(Tokenizer.parts(Bytes(), ["a", "", "b"])) == ["ab"] and list(Tokenizer.parts(Bytes(), [])) == []
