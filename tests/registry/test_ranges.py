"""Ranges of numbers: read from the annotations, shown, and enforced from a configuration and from Python."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hydra.utils import get_object

from blockwright import registry
from blockwright.blocks.compose import check
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import UNBOUNDED, BelowOne, Count, Fraction, Number, Positive, Whole, numbers
from blockwright.registry.schema import Parameter, conforms, fault, in_words
from blockwright.training.configuration.composing import compose_config

ROOT = Path(__file__).resolve().parents[2]
Infinite = Annotated[float, Ge(0), UNBOUNDED]


FITS: list[tuple[Any, list[Any], list[Any]]] = [
    (Count, [1, 7], [0, -1, 1.0, True, "1", None]),
    (Count | None, [1, None], [0, -2]),
    (Positive, [1, 1e-30, 2.5], [0, -1, 0.0, math.nan, math.inf, False]),
    (Fraction, [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    (BelowOne, [0.0, 0.999], [1, 1.0]),
    (Annotated[float, Gt(1), Lt(3)], [2], [1, 3]),
    (Annotated[int, Ge(1), Le(99)], [1, 99], [0, 100]),
    (Number, [-1e300, 0], [math.inf, -math.inf, math.nan]),
    (float, [1.0], [math.inf, math.nan]),
    (Infinite, [0, math.inf], [-1, -math.inf, math.nan]),
    (Count | Annotated[float, Gt(0), Lt(1)], [3, 0.5], [0, 1.0, 2.5]),
    (Count | Literal["auto"], [2, "auto"], [0, "car"]),
    (list[Whole], [[], [0, 3]], [[-1], 3, [1.0]]),
    (tuple[BelowOne, BelowOne], [[0.9, 0.95]], [[0.9], [0.9, 1.0], 0.9]),
    (Sequence[Count], [[4], (4, 8)], [[0], 4, "48"]),
]


def test_value_conforms_to_its_range() -> None:
    for hint, fits, unfit in FITS:
        assert [conforms(value, hint) for value in (*fits, *unfit)] == [True] * len(fits) + [False] * len(unfit), hint


def test_range_is_said_in_words_and_shown_in_signs() -> None:
    rows = {
        Count: ("an integer of at least 1", "int ≥ 1"),
        Positive | None: ("a number above 0 or null", "float > 0 | None"),
        Fraction: ("a number of at least 0 and at most 1", "float in [0, 1]"),
        Annotated[float, Gt(0), Lt(1)]: ("a number above 0 and below 1", "float in (0, 1)"),
        list[Whole]: ("a list of integers of at least 0", "list[int ≥ 0]"),
    }
    for hint, expected in rows.items():
        assert (in_words(hint), Parameter("x", hint, hint, 1, None, "").type) == expected
    assert fault(math.nan, Positive) != fault(0, Positive)  # that it is not finite is said


def test_constructor_refuses_from_python_what_a_configuration_may_not_say() -> None:
    class Wheel:
        def __init__(self, spokes: Count, rim: Positive = 1.0, name: str = "", hub: Any = None) -> None:
            self.spokes, self.rim = spokes, rim

    class Spare(Wheel):
        pass

    enforced("car.wheel")(enforced("car.wheel")(Wheel))
    assert list(inspect.signature(Wheel).parameters) == ["spokes", "rim", "name", "hub"]
    assert Wheel(4, name=3).spokes == 4  # type: ignore[arg-type] # what is no number is not looked at
    for wheel, arguments, path in ((Wheel, (0,), "spokes"), (Wheel, (4, math.nan), "rim"), (Spare, (True,), "spokes")):
        with pytest.raises(ConfigError) as caught:
            wheel(*arguments)
        assert caught.value.path == f"car.wheel.{path}" and caught.value.remedy
    with pytest.raises(TypeError, match="spokes"):
        Wheel()  # type: ignore[call-arg]


def test_block_refuses_from_python_by_its_parameter() -> None:
    with pytest.raises(BlockError) as caught:
        registry.lookup("norm", "rmsnorm").cls(8, eps=math.inf)  # type: ignore[call-arg]
    assert caught.value.parameter == "eps"


def test_value_that_no_block_can_use_is_refused_on_the_command_line() -> None:
    with pytest.raises(ConfigError) as caught:
        check(compose_config(["model.gating.balance={name: expert}", "++model.gating.balance.alpha=-1.0"]).model)
    assert caught.value.path == "model.gating.balance.alpha"


def unbounded(hint: Any) -> bool:
    return any(not more for _, more in numbers(hint))


EVERY = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


def test_every_number_of_a_block_has_a_range() -> None:
    assert not [
        (kind, name, p.name)
        for kind, name in EVERY
        for p in registry.lookup(kind, name).schema.parameters.values()
        if not p.child and unbounded(p.annotation)
    ]


def test_every_number_of_what_a_configuration_calls_has_a_range() -> None:
    texts = [file.read_text() for file in (ROOT / "conf").rglob("*.yaml")]
    targets = {t for text in texts for t in re.findall(r"_target_: (blockwright\.(?:training|lab)\.[\w.]+)", text)}
    assert len(targets) > 5
    wrong = []
    for target in sorted(targets):
        called = get_object(target)
        if getattr(called.__init__, "__module__", "").startswith("blockwright."):  # not Lightning's
            hints = typing.get_type_hints(called.__init__, include_extras=True)
            parameters = inspect.signature(called).parameters
            wrong += [(target, name) for name, hint in hints.items() if name in parameters and unbounded(hint)]
    assert not wrong
