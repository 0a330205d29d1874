"""Hydra's sweep syntax means in a search what it means in a grid."""

from __future__ import annotations

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from blockwright.registry import ConfigError

pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from blockwright.lab.sweep.space import choices, ends, read_space

WRITTEN: dict[str, Any] = {
    "choice(a, b)": CategoricalDistribution(("a", "b")),
    "mla,gqa": CategoricalDistribution(("mla", "gqa")),
    "1,2.5,null,true": CategoricalDistribution((1, 2.5, "null", True)),
    "range(1, 9)": IntDistribution(1, 8),
    "range(0, 10, 3)": IntDistribution(0, 9, step=3),
    "range(0, 9, 3)": IntDistribution(0, 6, step=3),
    "range(0.0, 0.3, 0.1)": FloatDistribution(0.0, 0.2, step=0.1),
    "range(0, 1, 0.3)": FloatDistribution(0.0, 0.9, step=0.3),
    "interval(0, 1.5)": FloatDistribution(0, 1.5),
    "interval(2, 5)": FloatDistribution(2, 5),
    "int(interval(2, 5))": IntDistribution(2, 5),
    "tag(log, interval(1e-4, 1e-2))": FloatDistribution(1e-4, 1e-2, log=True),
    "tag(log, int(interval(1, 64)))": IntDistribution(1, 64, log=True),
}


@pytest.mark.parametrize("written", WRITTEN)
def test_sweep_is_read_as_a_distribution(written: str) -> None:
    space, fixed = read_space([f"x={written}"])
    assert space == {"x": WRITTEN[written]} and fixed == {}


@pytest.mark.parametrize("written", [w for w in WRITTEN if w.startswith(("range", "choice", "mla"))])
def test_values_of_a_grid_are_those_of_hydras_own_sweep(written: str) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"x={written}"])
    space, _ = read_space([f"x={written}"])
    assert [str(value) for value in choices(space["x"])] == pytest.approx(
        list(override.sweep_string_iterator()), abs=0
    ) or [float(value) for value in choices(space["x"])] == pytest.approx(
        [float(value) for value in override.sweep_string_iterator()]
    )


def test_fixed_value_takes_its_key_out_of_the_search() -> None:
    assert read_space(["x=interval(0, 1)", "y=a,b", "x=0.5"]) == (
        {"y": CategoricalDistribution(("a", "b"))},
        {"x": "0.5"},
    )


def test_interval_has_no_list_of_values_but_has_ends() -> None:
    space, _ = read_space(["x=interval(0.0, 1.0)"])
    assert ends(space["x"]) == [0.0, 1.0]
    with pytest.raises(ConfigError, match="sampler=grid tries every one"):
        choices(space["x"])


@pytest.mark.parametrize(
    "written",
    [
        "glob(*)",
        "interval(2, 1)",
        "interval(0, inf)",
        "interval(a, b)",
        "tag(log, interval(0, 1))",
        "tag(lgo, interval(1, 2))",
        "tag(log, range(1, 9))",
        "range(5, 1)",
        "shuffle(1, 2, 3)",
        "shuffle(range(1, 9))",
        "range(1, 5, 0)",
        "choice()",
        "[1",
    ],
)
def test_what_is_no_search_space_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match="is not a search space"):
        read_space([f"x={written}"])
