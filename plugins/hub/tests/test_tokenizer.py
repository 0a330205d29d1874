"""Our tokenizers, written as tokenizer.json, give ``transformers`` the same ids and the same text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers import files as tokenizer
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.data.tokenizers.chars import Chars

TRAINED_ON = [
    "To be, or not to be:\n\tthat is the question — naïve café! 0123\n\n" * 3,
    "日本語 and  double  blanks\r\n",
]
TEXTS = [
    *TRAINED_ON,
    "",
    " ",
    "\n\n  leading and trailing  \n",
    "To be   to be\tnot\n",
    "that's 2 questions, isn't it?",
    "\u0000\u007f\u00a0\u2028𝔘𝔫𝔦 👩‍👩‍👧 é",  # decomposed accents are not to be composed
]
MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": Bytes,
    "bytes padded": lambda: Bytes(320),
    "chars": lambda: Chars(80),
    "bpe": lambda: BPE(300),
    "bpe with ids left over": lambda: BPE(600),
}


@pytest.fixture(params=MAKERS)
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, transformers.PreTrainedTokenizerFast]:
    """Ours, fitted, and what transformers loads of it."""
    ours = MAKERS[request.param]()
    ours.fit(TRAINED_ON)
    tokenizer.write(ours.to_json(), tmp_path)
    return ours, transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_same_ids_and_the_same_text_again(both: tuple[Tokenizer, transformers.PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text) == ids
        expected = ours.decode(ids)
        assert theirs.decode(ids) == (expected.replace("\ufffd", "<|unknown|>") if ours.kind == "chars" else expected)


def test_every_id_keeps_its_number(both: tuple[Tokenizer, transformers.PreTrainedTokenizerFast]) -> None:
    ours, theirs = both
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eos == tokenizer.special(ours.to_json()).ends[0]
    assert theirs.decode([ours.eos], skip_special_tokens=True) == ""


def test_kind_of_a_plug_in_has_no_such_form(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written as tokenizer\.json"):
        tokenizer.write({"kind": "morse", "vocab_size": 9}, tmp_path)
    assert not list(tmp_path.iterdir())
