"""The text files beside a tokenizer.json: tokenizer settings, chat templates, generation defaults.

They stay with a model through fine-tuning and export. All of them are data: a chat template is stored, never run.
Checkpoints are untrusted, so only the file names below are written, and at most ``MAX_BYTES`` in total.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.folder import dump_json
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
