"""The data of skills: which tokens and targets a row has, that rows depend on the step alone, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blockwright.plugins.skills.module import SkillsDataModule
from blockwright.plugins.skills.rows import Mixed, SkillRows, ids_of
from blockwright.plugins.skills.skill.base import BLANK, MARKS, SYMBOLS
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.bytes import Bytes
from blockwright.training.data.tokenizers.chars import Chars
from tests import built

TWO = [{"name": "recall", "difficulty": 4}, {"name": "depth", "difficulty": 2}]


def module(**changes: Any) -> SkillsDataModule:
    usual = {
        "tokenizer": Chars(96),
        "sequence_length": 48,
        "batch_size": 6,
        "skill": TWO,
        "held_out": 10,
        "eval_batch_size": 10,
    }
    data: SkillsDataModule = built.data("skills", **{**usual, **changes})
    data.prepare_data()
    data.setup("fit")
    return data


def batches(data: SkillsDataModule, n: int) -> list[dict[str, torch.Tensor]]:
    return [batch for batch, _ in zip(data.train_dataloader(), range(n), strict=False)]


@pytest.mark.parametrize("tokenizer", [Chars(96), Bytes()])
def test_answers_are_scored_by_the_ids_of_their_symbols(tokenizer: Any) -> None:
    data = module(tokenizer=tokenizer)
    symbol_of = {int(token): symbol for symbol, token in enumerate(ids_of(data.tokenizer))}
    (batch,) = batches(data, 1)
    marks = []
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True):
        row = [symbol_of[token] for token in tokens]
        marks.append(MARKS.index(row[0]))
        scored = [t for t, target in enumerate(targets) if target != -100]
        assert scored and all(tokens[t + 1] == targets[t] for t in scored if t + 1 < len(tokens))
        for t in scored:
            assert data.skills[marks[-1]].oracle(row[1 : t + 1]) == symbol_of[targets[t]]
        assert all(symbol == BLANK for symbol in row[scored[-1] + 2 :])
    assert marks == [0, 1] * 3
    assert batch["n_bytes"].tolist() == (batch["targets"] != -100).sum(1).tolist()


def test_every_level_is_trained() -> None:
    data = module(skill=[{"name": "recall", "difficulty": 8}])
    told = {int((batch["targets"] != -100).long().argmax(1)[row]) for batch in batches(data, 20) for row in range(6)}
    assert told == {2 * pairs + 1 for pairs in (1, 2, 4, 8)}


def test_batches_are_a_function_of_the_seed_and_held_out_rows_are_the_same_for_all() -> None:
    one, again, other = (batches(module(seed=seed), 3) for seed in (0, 0, 1))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0]["tokens"], other[0]["tokens"]) and not torch.equal(one[0]["tokens"], one[1]["tokens"])
    (held,), (of_other,) = list(module().val_dataloader()), list(module(seed=9).val_dataloader())
    assert len(held["tokens"]) == 10 and torch.equal(held["tokens"], of_other["tokens"])
    assert not torch.equal(held["tokens"], next(iter(module().test_dataloader()))["tokens"])
    assert module(seed=1)._changes(module().state_dict()) == ["seed was 0, is 1"]
    harder = [{"name": "recall", "difficulty": 2}, TWO[1]]
    assert "skill.recall was" in module(skill=harder)._changes(module().state_dict())[0]


def test_a_padded_row_is_not_scored() -> None:
    data = module()
    rows = SkillRows(Mixed(data.skills, ids_of(data.tokenizer), 48, 0), "val").__getitems__([3, -1])
    assert (rows["targets"][0] != -100).any() and (rows["targets"][1] == -100).all() and rows["n_bytes"][1] == 0


def test_a_skill_alone_takes_every_row() -> None:
    (batch,) = batches(module(skill=["recall"], sequence_length=64), 1)
    mark = int(ids_of(Chars(96))[MARKS[0]])
    assert batch["tokens"][:, 0].tolist() == [mark] * 6


class Joined(Chars):
    """A tokenizer that does not know the last symbol."""

    def encode(self, text: str) -> Any:
        return np.minimum(super().encode(text), SYMBOLS)


@pytest.mark.parametrize(
    ("changes", "path", "words"),
    [
        ({"sequence_length": 20}, "data.skill", "needs rows of 28 tokens at"),
        ({"skill": ["recall", "recall"]}, "data.skill", "named twice"),
        ({"skill": []}, "data.skill", "1 to 20 skills"),
        ({"skill": ["recal"]}, "data.skill.0.name", "no skill is registered"),
        ({"skill": [{"name": "depth", "difficulty": 8}]}, "data.skill.0.difficulty", "goes around the cycle"),
        ({"tokenizer": Joined(96)}, "data.tokenizer", "each must be one"),
        ({"held_out": 0}, "data.held_out", ""),
        ({"difficulty": 4}, "data.difficulty", ""),
    ],
)
def test_data_that_cannot_be_are_refused(changes: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        module(**changes)
    assert refused.value.path == path and words in refused.value.rule and refused.value.remedy
