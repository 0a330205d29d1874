"""Write our tokenizers as ``tokenizer.json``, from their plain state in a checkpoint.

The end of a document becomes a special token; unused ids become entries that no text can match, so every id keeps its
number. For text without special tokens both sides give the same ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.manifest import dump_json
from blockwright.blocks.checkpoint.source import Source
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.folder import MAX_FILE_BYTES, parse_json, read_bytes
from blockwright.training.data.tokenizers import companions
from blockwright.training.data.tokenizers.companions import Special

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
EOS, UNKNOWN = "<|endoftext|>", "<|unknown|>"
COMPANIONS, SPECIAL = "companions", "special"  # keys of a pretrained tokenizer's state


def special(state: Mapping[str, Any]) -> Special:
    """The special tokens of a tokenizer. In ours, the token that ends a document also begins the next.

    Raises:
        ConfigError: the state of a pretrained one is damaged
    """
    if SPECIAL in state:
        return Special.from_json(state[SPECIAL], "data.tokenizer")
    if state["kind"] not in OURS:
        return Special(None, (state["eos"],) if type(state.get("eos")) is int else ())
    eos = {"bytes": lambda: 256, "chars": lambda: 1, "bpe": lambda: state["vocab_size"] - 1}[state["kind"]]()
    return Special(eos, (eos,), None, 0 if state["kind"] == "chars" else None)


def write(state: Mapping[str, Any], folder: Path, max_positions: int | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and the companion files of a pretrained tokenizer.

    Args:
        state: from ``Tokenizer.to_json``: ``kind`` and what that kind needs
        folder: must exist
        max_positions: longest sequence of the model, for settings without one

    Raises:
        ConfigError: a kind without such a form, or a damaged state
    """
    if state["kind"] not in KINDS:
        raise ConfigError(
            "data.tokenizer", state["kind"], "cannot be written as tokenizer.json", did_you_mean(state["kind"], KINDS)
        )
    engine = KINDS[state["kind"]](state)
    files = companions.check(state.get(COMPANIONS, {}), "data.tokenizer")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if max_positions is not None:
        settings["model_max_length"] = max_positions
    if state["kind"] in OURS:
        settings |= {"eos_token": EOS, "bos_token": EOS}
    if state["kind"] == "chars":
        settings["unk_token"] = UNKNOWN
    if companions.SETTINGS in files:
        settings = {}
    settings |= {**state.get("config", {}), **companions.values(files, companions.SETTINGS)}
    dump_json(folder / "tokenizer.json", engine)
    companions.write({**files, companions.SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False)}, folder)


def _bytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Byte-level BPE without merges."""
    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    model = {"type": "BPE", "vocab": _filled(vocabulary, state["vocab_size"], {EOS: 256}), "merges": []}
    return _engine(model, _BYTE_LEVEL, _BYTE_LEVEL, {EOS: 256})


def _chars(state: Mapping[str, Any]) -> dict[str, Any]:
    """One token per character."""
    special = {UNKNOWN: 0, EOS: 1}
    vocabulary = {character: i + 2 for i, character in enumerate(state["characters"])}
    model = {"type": "WordLevel", "vocab": _filled(vocabulary, state["vocab_size"], special), "unk_token": UNKNOWN}
    each = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    return _engine(model, each, {"type": "Fuse"}, special)


def _bpe(state: Mapping[str, Any]) -> dict[str, Any]:
    """The trained engine, with the end of a document after its vocabulary."""
    engine = parse_json(state["tokenizers"], "data.tokenizer")
    end = {EOS: state["vocab_size"] - 1}
    model = {**engine["model"], "vocab": _filled(engine["model"]["vocab"], state["vocab_size"], end)}
    return _engine(model, engine["pre_tokenizer"], _BYTE_LEVEL, end)


def _pretrained(state: Mapping[str, Any]) -> dict[str, Any]:
    """A pretrained tokenizer, unchanged."""
    return parse_json(state["tokenizers"], "data.tokenizer")


OURS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"bytes": _bytes, "chars": _chars, "bpe": _bpe}
KINDS = {**OURS, "pretrained": _pretrained}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _engine(
    model: dict[str, Any], pre_tokenizer: dict[str, Any], decoder: dict[str, Any], special: Mapping[str, int]
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for word, i in special.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _filled(vocabulary: Mapping[str, int], size: int, special: Mapping[str, int]) -> dict[str, int]:
    """The vocabulary with special tokens and, up to ``size``, an entry for every unused id."""
    found = {**vocabulary, **special}
    taken = set(found.values())
    return {**found, **{f"<|unused {i}|>": i for i in range(size) if i not in taken}}


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE uses for each byte: itself, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def write_all(source: Source, folder: Path, max_positions: int) -> None:
    """Write the tokenizer of a model and the files beside it, or copy those of the folder that it was read from."""
    if source.tokenizer is not None:
        write(source.tokenizer, folder, max_positions)
    elif source.folder is not None:
        companions.write(companions.read(source.folder), folder)
        copy_files(VOCABULARIES, source.folder, folder)


def copy_files(names: Iterable[str], source: Path, folder: Path) -> None:
    """Copy those of the files that exist."""
    for name in names:
        if (source / name).is_file():
            (folder / name).write_bytes(read_bytes(source, name, MAX_FILE_BYTES))
