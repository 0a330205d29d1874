"""Whether a tokenizer is the one that made some ids: they are decoded and encoded again.

Of two byte-pair encodings of 16,383 ids, the right one gives 100 % of the ids back, the other 4 %.
"""

from __future__ import annotations

from difflib import SequenceMatcher

import numpy as np

from blockwright.registry.errors import ConfigError
from blockwright.training.data.fingerprint import digest
from blockwright.training.data.mixture.tokens import Tokens
from blockwright.training.data.tokenizers.base import Tokenizer, vocabulary_of

SAMPLES = 20
LENGTH = 256  # tokens of a sample
LEAST = 0.9  # a tokenizer that normalises text, by NFKC for instance, gives a little less than all


def ids_digest(tokenizer: Tokenizer) -> str:
    """Digest of what determines the ids of a text, and the end of a document; room in the vocabulary does not."""
    state = vocabulary_of(tokenizer.to_json())
    return digest({key: value for key, value in state.items() if key != "vocab_size"}, tokenizer.eos)


def samples(tokens: Tokens, n: int = SAMPLES, length: int = LENGTH) -> list[list[int]]:
    """Ids of n stretches, evenly spaced, each within a document and from its start, if one starts there."""
    firsts = np.linspace(0, max(0, tokens.n_tokens - length), n).astype(int).tolist()
    return [_within_a_document(tokens, first, min(first + length, tokens.n_tokens)) for first in dict.fromkeys(firsts)]


def _within_a_document(tokens: Tokens, first: int, last: int) -> list[int]:
    ids, begins = tokens.read(first, last)
    starts = [*(np.flatnonzero(begins[1:]) + 1).tolist(), len(ids)]
    begin, end = (0, starts[0]) if starts[0] >= len(ids) // 2 else (starts[0], starts[1])
    return ids[begin:end].tolist()


def agreement(tokens: Tokens, tokenizer: Tokenizer) -> float:
    """The share of ids that come back when stretches of the tokens are decoded and encoded again."""
    kept = total = 0
    for sample in samples(tokens):
        ids = [i for i in sample if i not in tokenizer.ends and i != tokenizer.bos]
        again = tokenizer.encode(tokenizer.decode(ids)).tolist()
        matching = SequenceMatcher(None, ids, again, autojunk=False).get_matching_blocks()
        kept, total = kept + sum(block.size for block in matching), total + len(ids)
    return kept / max(total, 1)


def refuse_other(tokens: Tokens, tokenizer: Tokenizer, path: str) -> None:
    """Refuse tokens that another tokenizer made, or that the vocabulary has not.

    Args:
        tokens: of a source
        tokenizer: of the run
        path: of the setting that names them

    Raises:
        ConfigError: at ``path``
    """
    remedy = "Use the tokenizer that made the files: data/tokenizer=pretrained data.tokenizer.file=…/tokenizer.json"
    highest = max(max(sample) for sample in samples(tokens))
    lowest = min(min(sample) for sample in samples(tokens))
    if highest >= tokenizer.vocab_size or lowest < 0:
        wrong = lowest if lowest < 0 else highest
        rule = f"has ids that the vocabulary of {tokenizer.vocab_size:,} has not"
        raise ConfigError(path, wrong, rule, f"{remedy}; or correct dtype")
    if (share := agreement(tokens, tokenizer)) < LEAST:
        rule = f"was made by another tokenizer: {share:.1%} of sampled ids come back when decoded and encoded again"
        raise ConfigError(path, f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids", rule, remedy)
