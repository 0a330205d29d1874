"""Locks by which the writers of a folder see each other."""

from __future__ import annotations

from pathlib import Path

from training import claims


def test_one_process_of_a_machine_writes_a_folder(tmp_path: Path) -> None:
    with claims.only_writer(tmp_path) as first:
        with claims.only_writer(tmp_path) as second:
            assert first and not second
        with claims.only_writer(tmp_path) as third:  # the second has left the lock to the first
            assert not third
    assert not list(tmp_path.iterdir())
    with claims.only_writer(tmp_path) as alone:
        assert alone


def test_lock_that_another_machine_has_left_is_no_writer(tmp_path: Path) -> None:
    with claims.only_writer(tmp_path):
        (tmp_path / claims.LOCK).write_text("7 0badc0de")
        with claims.only_writer(tmp_path) as alone:
            assert alone
    with claims.only_writer(tmp_path / "missing") as alone:
        assert alone
