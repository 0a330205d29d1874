"""A configuration has limits: of bytes, values, depth and size. What hostile ones try: tests/faults/test_hostile.py."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.limits import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_INTEGER,
    MAX_NODES,
    check_text,
    check_values,
    read_text,
)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_at_the_limit_it_passes_and_beyond_it_does_not() -> None:
    pairs = [
        (list(range(MAX_NODES - 1)), list(range(MAX_NODES))),
        (nested(MAX_DEPTH), nested(MAX_DEPTH + 1)),
        ({"a": MAX_INTEGER}, {"a": MAX_INTEGER + 1}),
        ({"a": -MAX_INTEGER}, {"a": -MAX_INTEGER - 1}),
    ]
    for good, bad in pairs:
        check_values(good, "model")
        with pytest.raises(ConfigError):
            check_values(bad, "model")


def test_text_is_measured_with_its_aliases_spelt_out() -> None:
    twice = "a: &a [1, 1, 1]\nb: &b [{0}]\nc: [{1}]"
    check_text(twice.format(", ".join(["*a"] * 10), ", ".join(["*b"] * 10)), "model")
    with pytest.raises(ConfigError, match="expands to more than"):
        check_text(twice.format(", ".join(["*a"] * 100), ", ".join(["*b"] * 100)), "model")
    with pytest.raises(ConfigError, match="nested more than"):
        check_text("[" * 40 + "]" * 40, "model")


def test_error_names_the_place() -> None:
    with pytest.raises(ConfigError) as caught:
        check_values({"a": [{"b": 2**60}]}, "model")
    assert caught.value.path == "model.a.0.b"


def test_own_configuration_may_refer() -> None:
    check_values({"a": "${b}"}, "model", data=False)
    with pytest.raises(ConfigError, match="may not contain"):
        check_values({"a": "${b}"}, "model")


def test_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("x" * MAX_BYTES)
    assert len(read_text(file, "model.file")) == MAX_BYTES
    file.write_text("x" * (MAX_BYTES + 1))
    for wrong, says in ((file, "longer than"), (tmp_path, "cannot be read"), (tmp_path / "none", "cannot be read")):
        with pytest.raises(ConfigError, match=says) as caught:
            read_text(wrong, "model.file")
        assert caught.value.path == "model.file"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_text(file, "model.file")


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a /dev/shm")
def test_file_in_shared_memory_is_read() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (Path(folder) / "model.yaml").write_text("a: 1")
        assert read_text(Path(folder) / "model.yaml", "model.file") == "a: 1"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs a /proc")
def test_link_that_changes_once_it_is_opened_leads_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, plain, opening = tmp_path / "link", tmp_path / "plain", os.open
    plain.write_text("a: 1")
    link.symlink_to("/proc/self/environ")

    def swapped(path: Any, flags: int) -> int:
        descriptor = opening(path, flags)
        link.unlink()
        link.symlink_to(plain)
        return descriptor

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(ConfigError, match="no file on a disk"):
        read_text(link, "model.file")
