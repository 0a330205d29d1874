"""A name may be another block with some parameters fixed."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
from omegaconf import OmegaConf
from torch import Tensor

from blockwright import registry
from blockwright.blocks.norm import Norm
from blockwright.registry import ConfigError, Node, RegistrationError, SameAs, Scope, register
from blockwright.registry.__main__ import main
from blockwright.registry.ranges import Count

pytestmark = pytest.mark.usefixtures("temporary_blocks")


class Grouped(Norm):
    """A norm of groups.

    Args:
        n_groups: how many there are
        n_means: how many of them have a mean
        eps: added somewhere
    """

    def __init__(self, dim: int, n_groups: Count = 4, n_means: Count = 2, eps: float = 0.5) -> None:
        super().__init__()
        self.values = (dim, n_groups, n_means, eps)

    def forward(self, x: Tensor) -> Tensor:
        return x


def derived(fixes: dict[str, Any], base: type = Grouped, name: str = "single") -> Any:
    cls = type("Single", (base,), {"__doc__": "A norm of one group.", "__module__": __name__})
    return register("norm", name, fixes=fixes)(cls)


def built(**node: Any) -> tuple[Any, ...]:
    return registry.build("norm", Node({"name": "single", **node}, "model.norm"), Scope({}, {"dim": 8})).values


def test_fixed_parameter_is_passed_and_the_others_stay_open() -> None:
    cls = derived({"n_groups": 1})
    assert built(eps=0.1) == (8, 1, 2, 0.1) == cls(8, eps=0.1).values == cls(8, 2, 0.1).values
    assert list(inspect.signature(cls).parameters) == ["dim", "n_means", "eps"]
    with pytest.raises(registry.BlockError, match="n_means"):  # ranges of the open ones still hold
        cls(8, n_means=0)
    with pytest.raises(TypeError, match="n_groups"):
        cls(8, n_groups=2)
    schema = registry.lookup("norm", "single").schema
    assert schema.summary == "A norm of one group." and schema.parameters["eps"].description == "added somewhere"
    assert schema.fixed["n_groups"].description == "how many there are"
    node = OmegaConf.structured(schema.dataclass)
    assert list(node) == ["name", "n_means", "eps"] and pickle.loads(pickle.dumps(schema.parameters))


def test_fixed_parameter_may_be_another_one_fixes_add_up_and_a_constructor_of_ones_own_has_none() -> None:
    same = derived({"n_means": SameAs("n_groups")})
    assert built(n_groups=7) == (8, 7, 7, 0.5) == same(8, 7).values and built() == (8, 4, 4, 0.5) == same(8).values
    first = derived({"n_groups": 1}, name="first")
    derived({"n_means": 3}, first, "double")
    schema = registry.lookup("norm", "double").schema
    assert {n: p.default for n, p in schema.fixed.items()} == {"n_groups": 1, "n_means": 3}
    assert list(schema.parameters) == ["eps"]

    def init(self: Any, dim: int) -> None: ...

    register("norm", "own")(type("Own", (first,), {"__init__": init, "__doc__": "A norm of its own."}))
    assert not registry.lookup("norm", "own").schema.fixed


def test_fixed_parameter_in_a_configuration_is_refused_with_the_blocks_that_take_it() -> None:
    derived({"n_groups": 1})
    register("norm", "groups")(Grouped)
    with pytest.raises(ConfigError) as refusal:
        built(n_groups=2)
    assert refusal.value.path == "model.norm.n_groups" and refusal.value.remedy.endswith(": groups")


def test_fixed_parameters_are_shown_as_fixed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["attention/mha"])
    rows = {line.split()[0]: line.split()[1:3] for line in capsys.readouterr().out.splitlines() if " fixed " in line}
    assert rows == {"n_kv_heads": ["fixed", "n_heads"], "window": ["fixed", "null"]}


def test_what_cannot_be_fixed_is_refused() -> None:
    wrong = [{"n_group": 1}, {"n_groups": 0}, {"n_groups": SameAs("n_mean")}]
    for fixes in (*wrong, {"n_groups": SameAs("n_means"), "n_means": 2}):
        with pytest.raises(RegistrationError, match=next(iter(fixes))):
            derived(fixes)
    register("norm", "groups")(Grouped)
    with pytest.raises(RegistrationError, match="derive a class"):
        register("norm", "single", fixes={"n_groups": 1})(Grouped)
