"""Contenders in processes of their own, taking turns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.race import Entry, Race, paired, spread

pytestmark = pytest.mark.xdist_group("race")  # its fixture runs a whole race, once

ROUNDS = 3


@pytest.fixture(scope="module")
def race() -> Iterator[Race]:
    """A race: one good, one that takes much memory, one that fails in its second turn, one that does not exist."""
    jobs = {"good": (0, 1), "large": (0, 300), "failing": (2, 1)}
    entries = []
    for label, (at, size) in jobs.items():
        arguments = {"fails_at": at, "megabytes": size}
        entries.append(Entry(label, "tests.benchmarks.toy_jobs:Toy", arguments, tuned=label == "large"))
    entries.append(Entry("absent", "benchmarks.no_such_module:Job", {}, tuned=False))
    with Race(entries, "cpu", threads=1) as made:
        made.run(ROUNDS, seconds=60, word="hello")
        yield made


@pytest.mark.slow
def test_contenders_have_processes_settings_and_memory_of_their_own_and_each_round_asks_all(race: Race) -> None:
    good, large, failing, absent = race.entries
    assert len({entry.about["pid"] for entry in race.entries[:3]}) == 3
    assert all(entry.about["threads"] == "1" for entry in race.entries[:3])
    for entry in (good, large):
        assert {r: turn["count"] for r, turn in entry.turns.items()} == {0: 1, 1: 2, 2: 3}
        assert all(turn["arguments"] == {"word": "hello"} for turn in entry.turns.values())
    assert failing.failed == "RuntimeError: told to" and list(failing.turns) == [0]
    assert "no_such_module" in (absent.failed or "") and absent.turns == {}
    small, big = (max(t["peak_bytes"] for t in entry.turns.values()) for entry in (good, large))
    assert 250e6 < big - small < 400e6
    settings = {entry.label: entry.about["settings"] for entry in race.entries[:3]}
    assert settings["good"] == settings["failing"] and settings["good"]["precision"] == "highest"
    assert not settings["good"]["kept_memory"] and settings["large"]["kept_memory"]
    assert all(found["error"] < 2e-6 for found in settings.values())  # whatever was chosen, fp32 stays fp32


def test_order_turns_from_round_to_round() -> None:
    race = Race([Entry(label, "", {}) for label in "abc"], "cpu", 1)
    assert ["".join(entry.label for entry in race.order(i)) for i in range(4)] == ["abc", "bca", "cab", "abc"]


def test_spread_has_the_median_and_the_quartiles() -> None:
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]).plain() == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert spread([7.0]).plain() == {"median": 7.0, "q1": 7.0, "q3": 7.0, "n": 1}


def test_ratios_pair_what_was_measured_in_one_round() -> None:
    """A machine that is half as fast in the second round leaves the ratio alone; a round of one side does not count."""
    found = paired({0: 20.0, 1: 10.0, 2: 99.0}, {0: 10.0, 1: 5.0, 3: 1.0})
    assert found is not None
    assert found.plain() == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 2}
    assert paired({0: 1.0}, {1: 1.0}) is None
