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

from blockwright import registry
from blockwright.blocks.compose import check
from blockwright.registry import BlockError, ConfigError
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import UNBOUNDED, BelowOne, Count, Fraction, Number, Positive, Whole, numbers
from blockwright.registry.schema import Parameter, conforms, fault, in_words

ROOT = Path(__file__).resolve().parents[2]
Infinite = Annotated[float, Ge(0), UNBOUNDED]


@pytest.mark.parametrize(
    ("hint", "fits", "not_"),
    [
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
    ],
    ids=str,
)
def test_value_conforms_to_its_range(hint: Any, fits: list[Any], not_: list[Any]) -> None:
    assert all(conforms(value, hint) for value in fits)
    assert not any(conforms(value, hint) for value in not_)


@pytest.mark.parametrize(
    ("hint", "words", "shown"),
    [
        (Count, "an integer of at least 1", "int ≥ 1"),
        (Positive | None, "a number above 0 or null", "float > 0 | None"),
        (Fraction, "a number of at least 0 and at most 1", "float in [0, 1]"),
        (Annotated[float, Gt(0), Lt(1)], "a number above 0 and below 1", "float in (0, 1)"),
        (list[Whole], "a list of integers of at least 0", "list[int ≥ 0]"),
        (int | None, "an integer or null", "int | None"),
    ],
    ids=str,
)
def test_range_is_said_in_words_and_shown_in_signs(hint: Any, words: str, shown: str) -> None:
    assert in_words(hint) == words
    assert Parameter("x", hint, hint, 1, None, "").type == shown


def test_message_says_what_a_number_that_is_none_should_be() -> None:
    assert fault(math.nan, Positive) == "must be a number above 0, and finite"
    assert fault(0, Positive) == "must be a number above 0"


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
    assert (caught.value.parameter, caught.value.rule) == ("eps", "must be a number above 0, and finite")


SMALL = {"vocab_size": 61, "d_model": 48, "n_layers": 1, "norm": "rmsnorm", "residual": "prenorm", "ffn": "moe"}
SMALL |= {"attention": "gqa", "position": "rope", "experts": {"name": "swiglu", "d_ff": 24}}


@pytest.mark.parametrize(
    ("kind", "name", "parameter", "value"),
    [
        ("gating", "sigmoid_bias", "bias_step", math.nan),
        ("balance", "expert", "alpha", -1.0),
        ("attention", "gqa", "n_heads", True),
    ],
)
def test_value_that_no_block_can_use_is_refused_on_the_command_line(
    kind: str, name: str, parameter: str, value: Any
) -> None:
    from blockwright.training.configuration.composing import compose_config

    path = f"model.{kind}.{parameter}" if kind != "balance" else f"model.gating.balance.{parameter}"
    written = f"'{value}'" if isinstance(value, str) else value
    choice = [f"model/{kind}={name}"] if kind not in ("balance", "gating") else [f"model/gating={name}"]
    choice = ["model.gating.balance={name: expert}"] if kind == "balance" else choice
    with pytest.raises(ConfigError) as caught:
        check(compose_config([*choice, f"{'++' if kind == 'balance' else ''}{path}={written}"]).model)
    assert caught.value.path == path and "must be" in caught.value.rule


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


OURS = sorted(
    {
        t
        for file in (ROOT / "conf").rglob("*.yaml")
        for t in re.findall(r"_target_: ((?:training|lab)\.\S+)", file.read_text())
    }
)


@pytest.mark.parametrize("target", OURS)
def test_every_number_of_what_a_configuration_calls_has_a_range(target: str) -> None:
    from hydra.utils import get_object

    called = get_object(target)
    if not getattr(called.__init__, "__module__", "").startswith(("training", "lab")):
        return  # none of its own, or Lightning's
    hints = typing.get_type_hints(called.__init__, include_extras=True)
    parameters = inspect.signature(called).parameters
    assert [name for name, hint in hints.items() if name in parameters and unbounded(hint)] == []
