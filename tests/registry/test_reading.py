"""A dataclass is read from a mapping by its annotations, and every mistake has its path, value and remedy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from blockwright.registry import BlockError, ConfigError
from blockwright.registry.ranges import Count, Positive
from blockwright.registry.reading import Key, Remedy, keys, read, typed


@dataclass(frozen=True)
class Hull:
    length: Count
    paint: Literal["red", "blue"] = "red"

    def __post_init__(self) -> None:
        if self.paint == "blue" and self.length > 9:
            raise BlockError("paint", self.paint, "is too little for a long hull", "Write paint=red")


@dataclass(frozen=True)
class Boat:
    name: Annotated[str, Remedy("Write name=mine")]
    hull: Hull
    spare: Hull | None = None
    fleet: dict[str, Hull] = field(default_factory=dict)
    masts: tuple[Positive, ...] = ()
    crew: Count | list[Count] | None = None
    sails: bool = True
    paint_colour: Annotated[str, Key("paint.colour")] = "none"


SMALL: dict[str, Any] = {"name": "a", "hull": {"length": 3}}


def test_mapping_is_read_into_nested_dataclasses() -> None:
    boat = read(
        Boat, {**SMALL, "fleet": {1: {"length": 2, "paint": "blue"}}, "masts": [1, 2.5], "spare": None, "crew": [3]}
    )
    assert boat == Boat("a", Hull(3), None, {"1": Hull(2, "blue")}, (1, 2.5), [3])


@pytest.mark.parametrize(
    ("settings", "path", "value", "remedy"),
    [
        ([1], "boat", [1], "hull"),
        ({**SMALL, "sail": True}, "boat.sail", True, "Did you mean 'sails'?"),
        ({"hull": {"length": 3}}, "boat.name", None, "Write name=mine"),
        ({**SMALL, "name": 3}, "boat.name", 3, "Write name=mine"),
        ({**SMALL, "hull": None}, "boat.hull", None, "length"),
        ({**SMALL, "hull": {}}, "boat.hull.length", None, "Write boat.hull.length=<an integer of at least 1>"),
        ({**SMALL, "hull": {"length": 0}}, "boat.hull.length", 0, "Write boat.hull.length=1"),
        ({**SMALL, "hull": {"length": 2.0}}, "boat.hull.length", 2.0, "Write boat.hull.length=1"),
        ({**SMALL, "hull": {"length": 3, "paint": "bleu"}}, "boat.hull.paint", "bleu", "Did you mean 'blue'?"),
        ({**SMALL, "hull": {"length": 10, "paint": "blue"}}, "boat.hull.paint", "blue", "Write paint=red"),
        ({**SMALL, "spare": {"lenght": 3}}, "boat.spare.lenght", 3, "Did you mean 'length'?"),
        ({**SMALL, "fleet": {"x": {"length": 0}}}, "boat.fleet.x.length", 0, "=1"),
        ({**SMALL, "fleet": [3]}, "boat.fleet", [3], ""),
        ({**SMALL, "masts": [1, 0]}, "boat.masts", [1, 0], ""),
        ({**SMALL, "masts": 0}, "boat.masts", 0, ""),
        ({**SMALL, "sails": 1}, "boat.sails", 1, "Write boat.sails=true or boat.sails=false"),
    ],
)
def test_mistake_has_path_value_and_remedy(settings: Any, path: str, value: Any, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(Boat, settings, "boat")
    assert (refused.value.path, refused.value.value) == (path, value) and remedy in refused.value.remedy


def test_the_only_item_of_a_tuple_may_stand_alone() -> None:
    assert read(Boat, {**SMALL, "masts": 2}).masts == (2,)


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("2e3", 2000), ("1,2", [1, 2]), ("[4]", [4]), ("null", None), ("x", "x"), ("[", "[")]
)
def test_word_becomes_what_its_field_takes(text: str, value: Any) -> None:
    assert typed(Boat, {"crew": text}) == {"crew": value}


def test_words_name_fields_by_their_keys() -> None:
    words = {"name": "7", "masts": "2", "sails": "false", "paint.colour": "red"}
    boat = read(Boat, {**typed(Boat, words), "hull": {"length": 1}})
    assert boat == Boat("7", Hull(1), masts=(2,), sails=False, paint_colour="red")
    assert keys(Hull) == ["length", "paint"] and "paint.colour" in keys(Boat)


@pytest.mark.parametrize(("key", "text"), [("paint.color", "red"), ("hull", "0"), ("masts", "0"), ("sails", "2")])
def test_word_that_cannot_be_converted_is_refused_at_its_key(key: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(Boat, {**SMALL, **typed(Boat, {key: text})})
    assert refused.value.path == key
