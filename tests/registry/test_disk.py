"""A full disk is one message, whatever was being written: by Python, by torch, by a library of another language."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from blockwright.blocks.checkpoint.folder import whole
from blockwright.registry import ConfigError
from blockwright.registry.command import run_command
from blockwright.registry.disk import os_error_of, refusal_of_full
from blockwright.training.entry.main import refusal_of
from blockwright.training.writing import write_text

LARGE = 100_000


@contextmanager
def full() -> Iterator[None]:
    """No file grows beyond a kilobyte: not for longer, as pytest may write its lines to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_command_says_what_could_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full():
        code = run_command(lambda given: write_text(tmp_path / "table.csv", "x" * LARGE), [])
    assert code == 64
    shown = capsys.readouterr().err
    assert f"error: disk = {tmp_path / 'table.csv'}" in shown and "File too large" in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_training_says_what_could_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, full():
        write_text(tmp_path / "results.json", "x" * LARGE)
    refusal = refusal_of(caught.value, [])
    assert refusal is not None and refusal.value == str(tmp_path / "results.json")


def test_error_of_torch_is_one_of_its_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="File too large"),
        full(),
        whole(tmp_path / "out") as folder,
        (folder / "last.ckpt").open("wb") as file,
    ):
        torch.save({"weights": torch.zeros(LARGE)}, file)
    assert not list(tmp_path.iterdir())


def test_other_errors_are_none_of_a_full_disk() -> None:
    assert refusal_of_full(OSError(errno.ENOENT, "No such file")) is None
    assert refusal_of_full(RuntimeError("shapes")) is None


def test_error_that_hides_what_was_before_is_none_of_it() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "f")
    for hides in (False, True):
        try:
            try:
                raise full
            except OSError:
                if hides:
                    raise RuntimeError("shapes") from None
                raise RuntimeError("torch: unexpected position") from full
        except RuntimeError as error:
            found = error
        assert os_error_of(found) is (None if hides else full)
