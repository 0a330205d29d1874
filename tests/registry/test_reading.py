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
    more = {"fleet": {1: {"length": 2, "paint": "blue"}}, "masts": [1, 2.5], "spare": None, "crew": [3]}
    assert read(Boat, {**SMALL, **more}) == Boat("a", Hull(3), None, {"1": Hull(2, "blue")}, (1, 2.5), [3])
    assert read(Boat, {**SMALL, "masts": 2}).masts == (2,)


HULL: dict[str, Any] = {"length": 3}
MISTAKES: list[tuple[Any, str, Any, str]] = [  # settings, path, value, and a part of the remedy
    ([1], "boat", [1], "hull"),
    ({**SMALL, "sail": True}, "boat.sail", True, "'sails'"),
    ({"hull": HULL}, "boat.name", None, "name=mine"),
    ({**SMALL, "name": 3}, "boat.name", 3, "name=mine"),
    ({**SMALL, "hull": None}, "boat.hull", None, "length"),
    ({**SMALL, "hull": {}}, "boat.hull.length", None, "boat.hull.length="),
    ({**SMALL, "hull": {"length": 0}}, "boat.hull.length", 0, "boat.hull.length=1"),
    ({**SMALL, "hull": {"length": 2.0}}, "boat.hull.length", 2.0, "boat.hull.length=1"),
    ({**SMALL, "hull": {**HULL, "paint": "bleu"}}, "boat.hull.paint", "bleu", "'blue'"),
    ({**SMALL, "hull": {"length": 10, "paint": "blue"}}, "boat.hull.paint", "blue", "paint=red"),
    ({**SMALL, "spare": {"lenght": 3}}, "boat.spare.lenght", 3, "'length'"),
    ({**SMALL, "fleet": {"x": {"length": 0}}}, "boat.fleet.x.length", 0, "=1"),
    ({**SMALL, "fleet": [3]}, "boat.fleet", [3], ""),
    ({**SMALL, "masts": [1, 0]}, "boat.masts", [1, 0], ""),
    ({**SMALL, "masts": 0}, "boat.masts", 0, ""),
    ({**SMALL, "sails": 1}, "boat.sails", 1, "boat.sails=true or boat.sails=false"),
]


def test_mistake_has_path_value_and_remedy() -> None:
    for settings, path, value, remedy in MISTAKES:
        with pytest.raises(ConfigError) as refused:
            read(Boat, settings, "boat")
        assert (refused.value.path, refused.value.value) == (path, value) and remedy in refused.value.remedy


def test_words_become_what_the_fields_of_their_keys_take() -> None:
    for text, value in {"3": 3, "2e3": 2000, "1,2": [1, 2], "[4]": [4], "null": None, "x": "x", "[": "["}.items():
        assert typed(Boat, {"crew": text}) == {"crew": value}
    words = {"name": "7", "masts": "2", "sails": "false", "paint.colour": "red"}
    boat = read(Boat, {**typed(Boat, words), "hull": {"length": 1}})
    assert boat == Boat("7", Hull(1), masts=(2,), sails=False, paint_colour="red")
    assert keys(Hull) == ["length", "paint"] and "paint.colour" in keys(Boat)
    for key, text in {"paint.color": "red", "hull": "0", "masts": "0", "sails": "2"}.items():
        with pytest.raises(ConfigError) as refused:
            read(Boat, {**SMALL, **typed(Boat, {key: text})})
        assert refused.value.path == key
