"""Rebuild a tokenizer from its state in a checkpoint. Only classes in a table are built, never a dotted path."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.manifest import start_from
from blockwright.blocks.checkpoint.source import checkpoint_of, read_start, tokenizer_state
from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.folder import MAX_FILE_BYTES, parse_json, read_text
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers.bpe import BPE
from blockwright.training.data.tokenizers.files import COMPANIONS
from blockwright.training.data.tokenizers.pretrained import Pretrained
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars, Tokenizer, vocabulary_of

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


# --- compare the tokenizer of a run with that of the weights that it starts from ---


TOKENIZER = "tokenizer.json"
NOT_IDS = ("vocab_size", "eos", "config")  # padding of the vocabulary, and which of its tokens ends a document


def check_start(start: str, tokenizer: Tokenizer) -> None:
    """Refuse weights whose embeddings mean other tokens. A tokenizer that is not fitted yet is not compared.

    Args:
        start: a run's folder, a checkpoint or an imported folder
        tokenizer: of the run that starts from it

    Raises:
        ConfigError: at ``data.tokenizer``
    """
    theirs = _state_at(Path(start))
    if theirs is None or not tokenizer.fitted:
        return
    ours = tokenizer.to_json()
    if _ids(theirs) != _ids(ours):
        rule = (
            f"has other ids than the tokenizer of {start} ({_named(theirs)}), so its embeddings would mean other tokens"
        )
        remedy = "Use that tokenizer (docs/how-to/fine-tune.md), fitted on the same text; or start from other weights"
        if written := [word for word in start_from(Path(start)) if word.startswith("data")]:
            remedy = f"Use that tokenizer: {shlex.join(written)}; or start from other weights"
        raise ConfigError("data.tokenizer", _named(ours), rule, remedy)


def _state_at(start: Path) -> Mapping[str, Any] | None:
    """The state of the tokenizer of some weights; None if none is known."""
    if checkpoint_of(start) is not None:
        return tokenizer_state(read_start(start))
    if not (start / TOKENIZER).is_file():
        return None
    return {"kind": "pretrained", "tokenizers": read_text(start, TOKENIZER, MAX_FILE_BYTES)}


def _ids(state: Mapping[str, Any]) -> dict[str, Any]:
    """What determines ids; of a tokenizer.json its tokens, however it is written."""
    found = {key: value for key, value in vocabulary_of(state).items() if key not in NOT_IDS}
    if isinstance(text := found.get("tokenizers"), str):
        content = parse_json(text, "data.tokenizer")
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        found |= {"tokenizers": [content["model"].get("vocab"), content["model"].get("merges"), added]}
    return found


def _named(state: Mapping[str, Any]) -> str:
    return f"{state.get('kind')}, {state.get('vocab_size', 'unknown')} ids"
