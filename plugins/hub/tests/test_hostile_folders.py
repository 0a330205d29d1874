"""Hostile folders to import: nothing of them runs, writes or reads a secret, and each is refused by its path."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blockwright.plugins.hub.importing import import_folder
from tests.faults import test_hostile as hostile
from tests.faults.test_hostile import Watch, at, refused

watch, warm = hostile.watch, hostile.warm


def foreign(tmp: Path, **settings: Any) -> Path:
    (tmp / "in").mkdir()
    (tmp / "in" / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    save_file({"a": torch.ones(1)}, tmp / "in" / "model.safetensors")
    return tmp / "in"


def indexed(tmp: Path, file: str) -> Path:
    folder = foreign(tmp)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    return folder


def ours(tmp: Path, composition: Any) -> Path:
    return foreign(tmp, model_type="blockwright", composition=composition)


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "config.json with a target": lambda tmp: import_folder(ours(tmp, at("ffn._target_", "os.system")), tmp / "out"),
    "config.json with code": lambda tmp: import_folder(
        foreign(tmp, model_type="x", auto_map={"A": "evil.py"}), tmp / "out"
    ),
    "config.json of great depth": lambda tmp: import_folder(
        foreign(tmp, num_hidden_layers=10**9, hidden_size=8, vocab_size=8, intermediate_size=8, num_attention_heads=1),
        tmp / "out",
    ),
    "config.json nested without end": lambda tmp: _nested(tmp),
    "index that points above": lambda tmp: import_folder(indexed(tmp, "../a.safetensors"), tmp / "out"),
    "index that points to the root": lambda tmp: import_folder(indexed(tmp, "/etc/passwd.safetensors"), tmp / "out"),
    "index that names a pickle": lambda tmp: import_folder(indexed(tmp, "a.bin"), tmp / "out"),
    "header of safetensors that lies": lambda tmp: _lying(tmp),
}


def _nested(tmp: Path) -> Any:
    folder = foreign(tmp)
    (folder / "config.json").write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    return import_folder(folder, tmp / "out")


def _lying(tmp: Path) -> Any:
    folder = foreign(tmp)
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return import_folder(folder, tmp / "out")


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_folder_is_refused(name: str, watch: Watch, tmp_path: Path) -> None:
    refused(lambda: FOLDERS[name](tmp_path), watch, tmp_path)
