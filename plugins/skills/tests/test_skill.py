"""Skills: every answer follows from the symbols before it, and chance is what is left without them."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from blockwright import registry
from blockwright.plugins.skills.skill.base import (
    ASK,
    BLANK,
    CONTENT,
    END,
    GUESSED,
    LOWER,
    MINUS,
    PLUS,
    SYMBOLS,
    TIMES,
    UPPER,
    Skill,
    random_state,
)
from blockwright.registry import ConfigError, Node, Scope

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


def test_the_battery_is_here() -> None:
    assert set(OUR_NAMES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_answers_everything_from_the_symbols_alone(name: str) -> None:
    made = skill(name)
    for difficulty in {made.least, made.levels[0], made.levels[-1]}:
        asked = answers(made, difficulty, 10)
        assert asked and all(made.oracle(before) == answer for before, answer in asked)


@pytest.mark.parametrize("name", [name for name in NAMES if skill(name).bits(1) is None])
def test_an_answer_depends_on_what_the_row_told(name: str) -> None:
    """With other symbols told before the same question, the oracle answers otherwise: no answer is stored."""
    made = skill(name)
    asked = [one for seed in range(40) for one in answers(made, made.difficulty, 4, seed)]
    answered: dict[int, set[int]] = {}
    for before, answer in asked:
        answered.setdefault(before[-1], set()).add(answer)
    assert max(map(len, answered.values())) > 1


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
CHANCE = {
    "recall": 1 / len(UPPER),
    "overwriting": 1 / len(UPPER),
    "stacked": 1 / 22,
    "selective_copy": 1 / len(CONTENT),
    "depth": 1 / (len(LOWER) - 1),
}


@pytest.mark.parametrize("name", CHANCE)
def test_chance_is_that_of_a_guess_among_all_answers(name: str) -> None:
    made = skill(name)
    chance, n = made.chance(made.difficulty), len(answers(made, made.difficulty, GUESSED // 2))
    assert abs(chance - CHANCE[name]) < 4 * math.sqrt(CHANCE[name] / n)


@pytest.mark.parametrize("name", NAMES)
def test_chance_leaves_room_for_the_skill(name: str) -> None:
    made = skill(name)
    assert made.chance(made.difficulty) < 0.6


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


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ({"name": "recal"}, "skill.name"),
        ({"name": "recall", "difficulty": 33}, "skill.difficulty"),
        ({"name": "recall", "difficulty": 0}, "skill.difficulty"),
        ({"name": "recall", "difficulty": "hard"}, "skill.difficulty"),
        ({"name": "recall", "pairs": 4}, "skill.pairs"),
        ({"name": "depth", "difficulty": 8}, "skill.difficulty"),
        ({"name": "arithmetic", "modulus": 65}, "skill.modulus"),
        ({"name": "knowledge", "difficulty": 10**9}, "skill.difficulty"),
    ],
)
def test_skills_that_cannot_be_are_refused(node: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        registry.build("skill", Node(node, "skill"), Scope({}, {}))
    assert refused.value.path == path and refused.value.remedy
