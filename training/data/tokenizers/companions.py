"""The text files beside a tokenizer.json: tokenizer settings, chat templates, generation defaults.

They stay with a model through fine-tuning and export. All of them are data: a chat template is stored, never run.
Checkpoints are untrusted, so only the file names below are written, and at most ``MAX_BYTES`` in total.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.manifest import ORIGIN, dump_json, read_json
from blockwright.registry import ConfigError
from blockwright.registry.folder import parse_json, read_text

SETTINGS, SPECIAL, GENERATION = "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"
NAMES = (SETTINGS, SPECIAL, GENERATION, "added_tokens.json", "chat_template.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
TEMPLATE = re.compile(rf"{TEMPLATES}/[A-Za-z0-9_][A-Za-z0-9_.-]*\.jinja")
MAX_BYTES = 8 * 2**20  # total

# Paths of another machine, and remote code, which is not copied: transformers would ask for trust_remote_code.
NOT_EXPORTED = ("auto_map", "name_or_path", "tokenizer_file", "special_tokens_map_file")


def read(folder: Path) -> dict[str, str]:
    """Read the companion files of a folder: name → text.

    Raises:
        ConfigError: a file is not text, a .json file is not JSON, or all together are too long
    """
    templates = sorted(f"{TEMPLATES}/{file.name}" for file in (folder / TEMPLATES).glob("*.jinja"))
    found: dict[str, str] = {}
    for name in (*NAMES, *(name for name in templates if TEMPLATE.fullmatch(name))):
        if (folder / name).is_file():
            found[name] = read_text(folder, name, MAX_BYTES)
    return check(found, str(folder))


def check(files: Any, where: str) -> dict[str, str]:
    """Validate the companion files in a checkpoint: names and texts that ``read`` could have returned.

    Raises:
        ConfigError: at the path ``where``
    """
    if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
        raise ConfigError(where, type(files).__name__, "must map file names to texts", "Use a checkpoint of a training")
    for name in files:
        if name not in NAMES and not TEMPLATE.fullmatch(str(name)):
            rule = "is not a tokenizer file"
            raise ConfigError(where, str(name)[:100], rule, "Do not trust this checkpoint")
    size = sum(len(text.encode(errors="replace")) for text in files.values())
    if size > MAX_BYTES:
        rule = f"the files beside tokenizer.json have {size:,} bytes, more than {MAX_BYTES:,}"
        raise ConfigError(where, ", ".join(files), rule, "Shorten or remove the longest of them")
    for name in files:
        values(files, name, where)
    return dict(files)


def values(files: Mapping[str, str], name: str, where: str = "tokenizer") -> dict[str, Any]:
    """The contents of a JSON file, which must be a mapping; empty if there is none.

    Raises:
        ConfigError: it is not a mapping
    """
    if name not in files or not name.endswith(".json"):
        return {}
    found = parse_json(files[name], f"{where}: {name}")
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {name}", type(found).__name__, "must hold a mapping", "Fetch it again")
    return found


def write(files: Mapping[str, str], folder: Path) -> None:
    """Write validated files; tokenizer settings without the keys that apply to one machine only."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    settings = values(files, SETTINGS)
    if settings.keys() & set(NOT_EXPORTED):
        dump_json(folder / SETTINGS, {key: value for key, value in settings.items() if key not in NOT_EXPORTED})


# --- the special tokens of a model, collected from every file that names one ---


# End-of-turn tokens. Some published chat models list them nowhere among their end tokens.
TURNS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>")


@dataclass(frozen=True)
class Special:
    """Ids of special tokens; None where a model has none.

    Args:
        bos: begins a document
        ends: each ends a text; the first ends a document in training
        pad: fills batch rows
        unk: replaces what the vocabulary lacks
    """

    bos: int | None = None
    ends: tuple[int, ...] = ()
    pad: int | None = None
    unk: int | None = None

    @classmethod
    def from_json(cls, state: Any, where: str) -> Special:
        """From the output of ``dataclasses.asdict``, as stored in a checkpoint.

        Raises:
            ConfigError: at the path ``where``, for anything else
        """
        given = {**state, "ends": tuple(state.get("ends", ()))} if isinstance(state, dict) else {}
        single = [given.get(name) for name in ("bos", "pad", "unk")]
        if given.keys() != cls.__dataclass_fields__.keys() or not all(
            map(_is_id, [*given["ends"], *(i for i in single if i is not None)])
        ):
            rule = "must name the ids of bos, ends, pad and unk"
            raise ConfigError(where, type(state).__name__, rule, "Use a checkpoint of a training")
        return cls(**given)

    def ids(self) -> dict[str, Any]:
        """In the format of config.json: one end token as a number, several as a list."""
        ends = self.ends[0] if len(self.ends) == 1 else list(self.ends) or None
        padding = {} if self.pad is None else {"pad_token_id": self.pad}
        return {"bos_token_id": self.bos, "eos_token_id": ends, **padding}


def resolve(
    files: Mapping[str, str],
    model: Mapping[str, Any],
    words: Mapping[str, int],
    special_words: Collection[str],
    eos: str | None = None,
) -> Special:
    """The special tokens that a tokenizer's files and its model's config.json name.

    A token named in tokenizer_config.json or special_tokens_map.json takes precedence over an id in
    generation_config.json, and that over one in config.json. End tokens are the union of all, and of ``TURNS`` where
    those are special tokens.

    Args:
        files: from ``companions.read``
        model: config.json, possibly incomplete
        words: the vocabulary, added tokens included → ids
        special_words: which of them are special tokens
        eos: the token that ends a document, overriding the files

    Raises:
        ConfigError: an id is not an integer
    """
    settings, mapped, generation = (values(files, name) for name in (SETTINGS, SPECIAL, GENERATION))
    further = settings.get("extra_special_tokens")
    named = (settings, mapped, further if isinstance(further, dict) else {})

    def by_word(key: str) -> list[int]:
        found = [source.get(key) for source in named]
        texts = [word.get("content") if isinstance(word, dict) else word for word in found]
        return [words[text] for text in texts if isinstance(text, str) and text in words]

    def by_id(key: str) -> list[int]:
        return [*_ids(generation, key, GENERATION), *_ids(model, key, "config.json")]

    turns = [words[word] for word in TURNS if word in special_words]
    first = [words[eos]] if eos is not None and eos in words else []
    ends = [*first, *by_word("eos_token"), *by_id("eos_token_id"), *by_word("eot_token"), *turns]
    return Special(
        _first([*by_word("bos_token"), *by_id("bos_token_id")]),
        tuple(dict.fromkeys(ends)),
        _first([*by_word("pad_token"), *by_id("pad_token_id")]),
        _first(by_word("unk_token")),
    )


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of the model in a tokenizer's folder, imported or not; empty if there is none.

    Raises:
        ConfigError: it is unreadable
    """
    if (folder / ORIGIN).is_file():
        found = read_json(folder / ORIGIN).get("config")
        return found if isinstance(found, dict) else {}
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _ids(source: Mapping[str, Any], key: str, file: str) -> list[int]:
    found = source.get(key)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(map(_is_id, ids)):
        raise ConfigError(f"{file}: {key}", found, "must be an id, or a list of ids", f"Correct it in {file}")
    return ids


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _first(ids: Iterable[int]) -> int | None:
    return next(iter(ids), None)
