"""Hugging Face folders and GGUF files as models to open, without an import: ``blockwright chat DIR``."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from blockwright.blocks.checkpoint.source import Source
from blockwright.blocks.compose import check
from blockwright.plugins.hub.gguf import unpack
from blockwright.plugins.hub.importing import read_folder
from blockwright.training.data.tokenizers.pretrained import Pretrained


def open_folder(path: Path) -> Source | None:
    """A folder with config.json and safetensors; None for anything else.

    Raises:
        ConfigError: as for ``blockwright import``
    """
    if not (path / "config.json").is_file():
        return None
    found = read_folder(path)
    return Source(check(found.model), found.tensors(), None, path, found.origin, str(path))


def open_gguf(path: Path) -> Source | None:
    """A file of llama.cpp, dequantised; None for anything else.

    Raises:
        ConfigError: as for ``blockwright import``
    """
    if path.suffix != ".gguf" or not path.is_file():
        return None
    with TemporaryDirectory(prefix="blockwright.") as unpacked:
        folder = Path(unpacked)
        unpack(path, folder)
        found = read_folder(folder)
        words = Pretrained(str(folder / "tokenizer.json")).to_json()
        return Source(check(found.model), found.tensors(), words, None, found.origin, str(path))
