"""Locks by which the writers of a folder see each other."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

import pytest

from blockwright.training import claims


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


def test_lock_file_that_its_writer_removes_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer ends between another's opening of the file and its lock: that lock would be of a file without a name,
    and a third writer would be alone too."""
    flock, first = fcntl.flock, claims.only_writer(tmp_path)
    first.__enter__()

    def ends_before(descriptor: int, operation: int) -> Any:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ends_before)
    with claims.only_writer(tmp_path) as second, claims.only_writer(tmp_path) as third:
        assert second and not third


@pytest.mark.parametrize("left", [None, ""])
def test_lock_that_is_just_taken_or_left_has_a_writer(left: str | None, tmp_path: Path) -> None:
    """Its file is not written yet, or has no name any more: no traceback, and not alone."""
    with claims.only_writer(tmp_path):
        take = claims.take

        def fails(folder: Path) -> None:
            assert take(folder) is None
            (folder / claims.LOCK).unlink() if left is None else (folder / claims.LOCK).write_text(left)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims, "take", fails)
            with claims.only_writer(tmp_path) as second:
                assert not second


def test_locks_of_the_killed_are_removed_and_those_of_the_living_and_of_other_machines_stay(tmp_path: Path) -> None:
    (killed := tmp_path / f".{claims.new_owner()}.lock").touch()
    (elsewhere := tmp_path / ".another-machine-01234567-0123456789ab.lock").touch()
    with claims.claimed(tmp_path, owner := claims.new_owner()):
        claims.remove_old_locks(tmp_path)
        assert set(tmp_path.iterdir()) == {elsewhere, tmp_path / f".{owner}.lock"} and not killed.exists()


def test_claim_whose_lock_is_removed_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock

    def removed_before(descriptor: int, operation: int) -> Any:
        monkeypatch.setattr(fcntl, "flock", flock)
        claims.remove_old_locks(tmp_path)
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with claims.claimed(tmp_path, owner := claims.new_owner()):
        claims.remove_old_locks(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f".{owner}.lock"]
