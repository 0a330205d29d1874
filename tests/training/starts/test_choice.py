"""Which starts a configuration chooses, and that nothing that trains names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from blockwright.registry import ConfigError, register
from blockwright.training.configuration import parts
from blockwright.training.starts.base import Start
from blockwright.training.starts.trained import Trained

TRAINING = Path(__file__).resolve().parents[3] / "training"


@pytest.fixture
def deriving(temporary_blocks: None) -> tuple[type[Start], type[Start]]:
    """Two starts that make all weights from those of ``init_from``."""

    @register("start", "grafted")
    class Grafted(Start):
        """Makes all weights."""

        derives = True

        def __init__(self) -> None:
            """Without settings."""

    @register("start", "averaged")
    class Averaged(Start):
        """Makes all weights."""

        derives = True

        def __init__(self) -> None:
            """Without settings."""

    return Grafted, Averaged


def test_weights_are_copied_before_other_starts_fill_them() -> None:
    chosen = parts.starts({"init_from": "RUN", "adapter": {"rank": 2}, "model": {}})
    assert [type(start).__name__ for start in chosen] == ["Trained", "Lora"]
    assert isinstance(chosen[0], Trained) and chosen[0].trained == "RUN"
    assert parts.starts({"init_from": None, "adapter": None}) == []


def test_start_that_derives_all_weights_replaces_the_copy(deriving: tuple[type[Start], type[Start]]) -> None:
    chosen = parts.starts({"init_from": "RUN", "adapter": {}, "grafted": {}})
    assert [type(start).__name__ for start in chosen] == ["Grafted", "Lora"]
    with pytest.raises(ConfigError) as caught:
        parts.starts({"init_from": "RUN", "grafted": {}, "averaged": {}})
    assert caught.value.path == "grafted"


@pytest.mark.parametrize("room", ["entry", "tasks", "parallel"])
def test_no_start_is_named_where_runs_are_made(room: str) -> None:
    words = re.compile(r"surgery|tower|lora|peft|[\"'.]adapter\b", re.IGNORECASE)
    named = [str(path) for path in (TRAINING / room).rglob("*.py") if words.search(path.read_text())]
    assert not named
