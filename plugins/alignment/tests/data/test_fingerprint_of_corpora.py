"""A cache's key is all that shaped it: corpora of post-training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockwright.plugins.alignment.data.preferences import Preferences
from blockwright.plugins.alignment.data.reasoning_gym import ReasoningGym
from blockwright.plugins.alignment.data.sorting import SortingPreferences
from tests.training.data.test_fingerprint import DRAWN, ROOM, SMALL, assert_documents_apart, talks, turns


def test_pairs_of_other_settings_have_another_key(tmp_path: Path) -> None:
    never = [{"role": "assistant", "content": "Never."}]
    for name in ("a", "b"):
        pairs = [{"prompt": turns(t)[:1], "chosen": turns(t)[1:], "rejected": never} for t in talks(name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    assert_documents_apart(
        Preferences, {"files": str(tmp_path / "a.jsonl")}, {"files": str(tmp_path / "b.jsonl"), **ROOM}
    )


def test_pairs_to_sort_of_other_settings_have_another_key() -> None:
    assert_documents_apart(SortingPreferences, SMALL, {**DRAWN, "shortest": 3, "longest": 9, "falling": 0.1})


def test_problems_of_other_settings_have_another_key() -> None:
    pytest.importorskip("reasoning_gym")
    other = {**DRAWN, "tasks": ["basic_arithmetic"], "settings": {"chain_sum": {"min_terms": 5, "max_terms": 6}}}
    assert_documents_apart(ReasoningGym, {"tasks": ["chain_sum"], **SMALL}, other)
