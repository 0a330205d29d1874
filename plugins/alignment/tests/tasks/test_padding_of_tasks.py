"""Padding changes nothing in any task of post-training, nor in the rows that completions are packed in."""

from __future__ import annotations

import pytest

from blockwright.plugins.alignment.data.preferences import SortingPreferences
from blockwright.plugins.alignment.data.prompt_module import PromptDataModule
from blockwright.plugins.alignment.rollouts import record
from blockwright.training.data.corpora import Sorting
from blockwright.training.data.modules.chat import ChatDataModule
from tests import built
from tests.training.tasks import test_padding as padding
from tests.training.tasks.test_padding import COLUMNS, FILL, Case, Make, widened

train = padding.train
FFN = {"name": "moe", "n_experts": 8, "shared": {"name": "swiglu", "d_ff": 20}}  # with 6, no layer is aligned
STAGES = [{"loss": "layers", "tokens": 200}, {"loss": "logits"}]
CASES = {
    "distill": Case("chat", Sorting, {"stages": STAGES, "teacher": "START"}, {"ffn": FFN}),
    "grpo": Case(
        "prompts", Sorting, {"reward": "exact_match", "group_size": 2, "max_new_tokens": 3, "init_from": "START"}
    ),
    "preference": Case("preferences", SortingPreferences, {"preference": "simpo"}),
    "reward": Case("preferences", SortingPreferences, {}),
}


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return CASES


def test_every_task_is_tested() -> None:
    assert sorted(CASES) == built.names("task", "blockwright.plugins.alignment")


def widen(packed: record._Packed) -> None:
    """Add padding to the rows that completions are packed in."""
    width = packed.tokens.shape[1]
    for name in ("tokens", "segments", "positions"):
        setattr(packed, name, widened(getattr(packed, name), FILL.get(name, 0)))
    packed.places = [place // width * (width + COLUMNS) + place % width for place in packed.places]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_padding_changes_nothing(train: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def pad() -> None:
        pack = record._Packed.__init__
        padding.pad(monkeypatch, ChatDataModule, PromptDataModule)
        monkeypatch.setattr(record._Packed, "__init__", lambda self, inputs: (pack(self, inputs), widen(self))[0])

    padding.assert_padding_changes_nothing(train, name, pad)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "distill"])
def test_layers_are_compiled_where_batches_have_one_shape(
    train: Make, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    padding.assert_compiled_where_batches_have_one_shape(train, monkeypatch, name)
