"""Rebuild a tokenizer from its state in a checkpoint. Only classes in a table are built, never a dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers.base import Tokenizer
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.data.tokenizers.files import COMPANIONS
from blockwright.training.data.tokenizers.pretrained import Pretrained

KINDS: dict[str, type[Tokenizer]] = {cls.kind: cls for cls in (Bytes, Chars, BPE, Pretrained)}


def rebuild(state: Mapping[str, Any], plugins: Mapping[str, type[Tokenizer]] | None = None) -> Tokenizer:
    """The tokenizer described by ``Tokenizer.to_json``'s result.

    Args:
        state: the plain dictionary from a checkpoint
        plugins: classes from elsewhere by their ``kind``, beside the built-in ones

    Raises:
        ConfigError: at ``data.tokenizer``, for an unknown kind
    """
    known = {**KINDS, **(plugins or {})}
    kind = state.get("kind")
    if kind not in known:
        raise ConfigError("data.tokenizer", kind, "the checkpoint names an unknown kind", did_you_mean(kind, known))
    made = known[kind].from_json(dict(state))
    if COMPANIONS in state:
        made.companions = companions.check(state[COMPANIONS], "data.tokenizer")
    return made
