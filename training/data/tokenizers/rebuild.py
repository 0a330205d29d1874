"""A tokenizer from the state that a checkpoint holds. Only classes named in a table are built, never a dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from registry.errors import ConfigError, did_you_mean
from training.data.tokenizers.base import Tokenizer
from training.data.tokenizers.bpe import BPE
from training.data.tokenizers.bytes import Bytes
from training.data.tokenizers.chars import Chars
from training.data.tokenizers.pretrained import Pretrained

KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (Bytes, Chars, BPE, Pretrained)}


def rebuild(state: Mapping[str, Any], guests: Mapping[str, type[Tokenizer]] | None = None) -> Tokenizer:
    """The tokenizer that ``Tokenizer.to_json`` described.

    Args:
        state: the plain dictionary, as a checkpoint holds it
        guests: classes from elsewhere by their ``kind``, beside the built-in ones

    Raises:
        ConfigError: at ``data.tokenizer``, for a kind that nobody knows
    """
    known = {**KINDS, **(guests or {})}
    kind = state.get("kind")
    if kind not in known:
        raise ConfigError("data.tokenizer", kind, "the checkpoint names an unknown kind", did_you_mean(kind, known))
    return known[kind].from_json(dict(state))
