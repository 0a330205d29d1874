"""Skills and their data: every answer follows from the symbols before it, chance is what is left without them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from blockwright import registry
from blockwright.plugins.skills.module import SkillsDataModule
from blockwright.plugins.skills.rows import Mixed, SkillRows, ids_of
from blockwright.plugins.skills.skill.base import (
    ASK,
    BLANK,
    CONTENT,
    END,
    GUESSED,
    LOWER,
    MARKS,
    MINUS,
    PLUS,
    SYMBOLS,
    TIMES,
    UPPER,
    Skill,
    random_state,
)
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.data.tokenizers.tokenizer import Bytes, Chars
from tests import built

NAMES = registry.names("skill")
OUR_NAMES = ("arithmetic", "breadth", "depth", "knowledge", "overwriting", "recall", "selective_copy", "stacked")


def skill(name: str, **settings: int) -> Skill:
    made: Skill = registry.build("skill", Node({"name": name, **settings}, "skill"), Scope({}, {}))
    return made


def answers(made: Skill, difficulty: int, n: int, seed: int = 3) -> list[tuple[list[int], int]]:
    """The symbols before each answer of n rows, and the answer."""
    asked = made.generate(seed, difficulty, n)
    rows = zip(asked.symbols.tolist(), asked.scored.tolist(), strict=True)
    return [(row[:at], row[at]) for row, scored in rows for at, is_answer in enumerate(scored) if is_answer]


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_answers_everything_from_what_the_row_told(name: str) -> None:
    """With other symbols told before the same question, it answers otherwise: only facts are stored."""
    made = skill(name)
    for difficulty in {made.least, made.levels[0], made.levels[-1]}:
        asked = answers(made, difficulty, 10)
        assert asked and all(made.oracle(before) == answer for before, answer in asked)
    answered: dict[int, set[int]] = {}
    for before, answer in (one for seed in range(40) for one in answers(made, made.difficulty, 4, seed)):
        answered.setdefault(before[-1], set()).add(answer)
    assert made.bits(1) is not None or max(map(len, answered.values())) > 1


@pytest.mark.parametrize("name", NAMES)
def test_no_question_is_scored_that_its_row_answers(name: str) -> None:
    """At every difficulty, one who copies what followed the same question, and else guesses, has the floor at most.

    Such a guess is one of the answers that the row tells, or one of all; the bound is that of so many answers.
    """
    made, random = skill(name), random_state(1)
    for difficulty in {made.least, made.levels[0], made.levels[-1]}:
        rows = [made.row(difficulty, random_state(2, i)) for i in range(40)]
        possible = {row.symbols[at] for row in rows for at in row.scored}
        right = scored = repeated = 0
        for row in rows:
            symbols, places, at, known = row.symbols, set(row.scored), len(row.told), dict[tuple[int, ...], int]()
            for asked, answer in row.questions:
                options = sorted(possible & set(row.told) - set(asked)) or sorted(possible)
                for place in range(at + len(asked), at + len(asked) + len(answer)):
                    question, guess = tuple(symbols[at:place]), options[random.randint(len(options))]
                    if place in places:
                        repeated += question in known
                        right += known.get(question, guess) == symbols[place]
                        scored += 1
                    known[question] = symbols[place]
                at += len(asked) + len(answer)
        floor = made.floor(difficulty)
        assert not repeated and right / scored <= floor + 4 * math.sqrt(floor * (1 - floor) / scored), difficulty


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_a_function_of_the_seed_and_fit_their_length(name: str) -> None:
    made = skill(name)
    for difficulty in {made.levels[0], made.levels[-1]}:
        one, again, other = (made.generate(seed, difficulty, 12) for seed in (0, 0, 1))
        assert (one.symbols == again.symbols).all() and (one.scored == again.scored).all()
        assert (one.symbols != other.symbols).any()
        assert one.symbols.shape == one.scored.shape == (12, made.length(difficulty))
        assert one.symbols.min() >= 0 and one.symbols.max() < SYMBOLS - 20 and not one.scored[:, 0].any()
        assert (one.symbols[one.scored] != BLANK).all()
        longest = max(len(made.row(difficulty, random_state(i)).symbols) for i in range(60))
        assert longest <= made.length(difficulty)


def test_rows_do_not_change_with_a_release() -> None:
    rows = [skill(name).generate(5, skill(name).difficulty, 4).symbols for name in OUR_NAMES]
    digest = hashlib.sha256(b"".join(row.astype("<i8").tobytes() for row in rows)).hexdigest()
    assert digest[:16] == "fdb341cbcb50219b"


# What a guess knows that sees the last symbol alone, where it is known in closed form.
CHANCE = {"recall": 1 / len(UPPER), "overwriting": 1 / len(UPPER), "stacked": 1 / 22}
CHANCE |= {"selective_copy": 1 / len(CONTENT), "depth": 1 / (len(LOWER) - 1)}


def test_chance_is_that_of_a_guess_among_all_answers_and_leaves_room_for_the_skill() -> None:
    for name in NAMES:
        made = skill(name)
        chance = made.chance(made.difficulty)
        assert chance < 0.6
        if name in CHANCE:
            n = len(answers(made, made.difficulty, GUESSED // 2))
            assert abs(chance - CHANCE[name]) < 4 * math.sqrt(CHANCE[name] / n), name


def test_levels_are_halves_of_the_hardest() -> None:
    assert skill("recall", difficulty=16).levels == [1, 2, 4, 8, 16]
    assert skill("knowledge", difficulty=300).levels == [18, 37, 75, 150, 300]
    assert skill("breadth", difficulty=3).levels == [2, 3]
    assert skill("depth", difficulty=1).levels == [1]


# --- each by itself ---------------------------------------------------------------------------------------------------


def test_recall_asks_every_key_and_no_distance_tells() -> None:
    row = skill("recall").row(5, random_state(1))
    told, asked = row.symbols[:10], row.symbols[10:]
    pairs = dict(zip(told[::2], told[1::2], strict=True))
    assert len(pairs) == 5 and set(asked[::2]) == set(pairs)
    assert asked[1::2] == [pairs[key] for key in asked[::2]] and row.scored == list(range(11, 20, 2))
    assert asked[::2] != told[::2]  # another order


def test_overwriting_asks_for_the_last_value() -> None:
    made = skill("overwriting", keys=3)
    changed = 0
    for seed in range(20):
        row = made.row(4, random_state(seed)).symbols
        told, asked = row[:14], row[14:]
        first = {key: told[2 * i + 1] for i, key in enumerate(told[:6:2])}
        last = dict(zip(told[::2], told[1::2], strict=True))
        assert dict(zip(asked[::2], asked[1::2], strict=True)) == last
        changed += first != last
    assert changed > 15


def test_stacked_goes_through_both_tables() -> None:
    row = skill("stacked").row(4, random_state(2))
    tables, asked = np.array(row.symbols[:16]).reshape(2, 4, 2), row.symbols[16:]
    first, second = (dict(table.tolist()) for table in tables)
    assert set(first.values()) == set(second) and not set(first) & set(second)
    assert asked[1::2] == [second[first[key]] for key in asked[::2]]


def test_selective_copy_keeps_the_order_and_leaves_out_blanks() -> None:
    row = skill("selective_copy").row(6, random_state(3))
    told, copied = row.symbols[:12], row.symbols[13:]
    assert row.symbols[12] == ASK and [s for s in told if s != BLANK] == copied and len(copied) == 6


def test_depth_goes_round_one_cycle() -> None:
    made = skill("depth", nodes=7)
    row = made.row(3, random_state(4)).symbols
    edges = dict(np.array(row[:14]).reshape(7, 2).tolist())
    node, seen = row[0], []
    while node not in seen:
        seen.append(node)
        node = edges[node]
    assert len(seen) == 7
    for hop, asked, answer in np.array(row[14:]).reshape(-1, 3).tolist():
        assert hop == UPPER[3] and answer == edges[edges[edges[asked]]]


def test_breadth_lists_all_that_is_reached_in_topological_order() -> None:
    branched = 0
    for seed in range(60):
        row = skill("breadth").row(8, random_state(seed)).symbols
        at = row.index(ASK)
        edges = np.array(row[:at]).reshape(-1, 2).tolist()
        answer = row[at + 2 : -1]
        reached, waiting = set(), [row[at + 1]]
        while waiting:
            for child in [y for x, y in edges if x == waiting[-1] and y not in reached] or [waiting.pop()]:
                if child not in reached and child != row[at + 1]:
                    reached.add(child)
                    waiting.append(child)
        assert row[-1] == END and sorted(answer) == sorted(reached - {row[at + 1]}) and answer
        order = {node: i for i, node in enumerate(answer)}
        assert all(order[x] < order[y] for x, y in edges if x in order and y in order)
        branched += len(answer) > 3
    assert branched > 20


def test_knowledge_is_one_world_of_facts() -> None:
    made = skill("knowledge")
    known: dict[tuple[int, int], int] = {}
    for seed in (0, 1):
        for row in made.generate(seed, 256, 100).symbols.reshape(-1, 3).tolist():
            assert known.setdefault((row[0], row[1]), row[2]) == row[2]
    assert 240 <= len(known) <= 256 and made.bits(256) == 256 * 6
    easy = {(row[0], row[1]) for row in made.generate(2, 16, 50).symbols.reshape(-1, 3).tolist()}
    assert len(easy) == 16 and easy <= set(known)


def test_arithmetic_is_that_of_python() -> None:
    def value(symbols: list[int]) -> int:
        head = symbols.pop(0)
        if head in CONTENT:
            return CONTENT.index(head)
        a, b = value(symbols), value(symbols)
        return {PLUS: a + b, MINUS: a - b, TIMES: a * b}[head]

    made = skill("arithmetic", modulus=11)
    row = made.row(3, random_state(6))
    ends = [at - 1 for at in row.scored]
    starts = [0, *(at + 1 for at in row.scored)]
    for start, end in zip(starts, ends, strict=False):
        assert CONTENT[value(row.symbols[start:end]) % 11] == row.symbols[end + 1] and end - start == 7


# --- mistakes ---------------------------------------------------------------------------------------------------------


BAD_SKILLS: list[tuple[dict[str, object], str]] = [
    ({"name": "recal"}, "skill.name"),
    ({"name": "recall", "difficulty": 33}, "skill.difficulty"),
    ({"name": "recall", "difficulty": 0}, "skill.difficulty"),
    ({"name": "recall", "difficulty": "hard"}, "skill.difficulty"),
    ({"name": "recall", "pairs": 4}, "skill.pairs"),
    ({"name": "depth", "difficulty": 8}, "skill.difficulty"),
    ({"name": "arithmetic", "modulus": 65}, "skill.modulus"),
    ({"name": "knowledge", "difficulty": 10**9}, "skill.difficulty"),
]


def test_skills_that_cannot_be_are_refused() -> None:
    for node, path in BAD_SKILLS:
        with pytest.raises(ConfigError) as refused:
            registry.build("skill", Node(node, "skill"), Scope({}, {}))
        assert refused.value.path == path and refused.value.remedy


TWO = [{"name": "recall", "difficulty": 4}, {"name": "depth", "difficulty": 2}]


def module(**changes: Any) -> SkillsDataModule:
    usual = {"tokenizer": Chars(96), "sequence_length": 48, "batch_size": 6, "skill": TWO}
    usual |= {"held_out": 10, "eval_batch_size": 10}
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
    assert module(seed=1).changes(module().state_dict()) == ["seed was 0, is 1"]
    harder = [{"name": "recall", "difficulty": 2}, TWO[1]]
    assert "skill.recall was" in module(skill=harder).changes(module().state_dict())[0]


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


BAD_DATA: list[tuple[dict[str, Any], str]] = [
    ({"sequence_length": 20}, "data.skill"),
    ({"skill": ["recall", "recall"]}, "data.skill"),
    ({"skill": []}, "data.skill"),
    ({"skill": ["recal"]}, "data.skill.0.name"),
    ({"skill": [{"name": "depth", "difficulty": 8}]}, "data.skill.0.difficulty"),
    ({"tokenizer": Joined(96)}, "data.tokenizer"),
    ({"held_out": 0}, "data.held_out"),
    ({"difficulty": 4}, "data.difficulty"),
]


def test_data_that_cannot_be_are_refused() -> None:
    for changes, path in BAD_DATA:
        with pytest.raises(ConfigError) as refused:
            module(**changes)
        assert refused.value.path == path and refused.value.remedy
