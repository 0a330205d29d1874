"""``_target_`` nodes: a mistyped argument is found before anything is called."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from blockwright.registry import ConfigError
from blockwright.training.configuration.instantiate import check_target, instantiate

HERE = __name__


class Thing:
    """Takes a few typed arguments."""

    def __init__(self, size: int, rate: float = 0.1, mode: Literal["a", "b"] = "a", inner: Any = None) -> None:
        if size > 100:
            raise ValueError(f"size {size} is too large\nand a second line")
        if size == 100:
            raise ConfigError("thing.size", size, "is refused by the thing itself", "Write 99")
        if size == 99:
            raise ModuleNotFoundError("No module named 'wandb'")
        self.size, self.rate, self.mode, self.inner = size, rate, mode, inner


class Open:
    """Takes anything."""

    def __init__(self, **anything: Any) -> None:
        self.anything = anything


def node(**arguments: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.Thing", **arguments}


def refusal(given: Any, **options: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_target(given, "part", **options)
    assert caught.value.rule and caught.value.remedy
    return caught.value


def test_right_arguments_pass_and_build() -> None:
    good = node(size=3, rate=1, mode="b", inner=node(size=2))
    check_target(good, "part")
    built = instantiate(good, "part")
    assert (built.size, built.rate, built.mode, built.inner.size) == (3, 1, "b", 2)
    for passes in (
        node(_partial_=True),
        {"_target_": f"{HERE}.Open", "whatever": 1},
        None,
        3,
        "text",
        [1, 2],
        {"a": 1},
    ):
        check_target(passes, "part")
    check_target(node(size="three", inner=node(x=1)), "part", skip=("inner", "size"))  # keys of other readers


@pytest.mark.parametrize(
    ("given", "path", "says"),
    [
        (node(size=3, raet=1), "part.raet", "Did you mean 'rate'"),
        (node(_partial_=True, raet=0.5), "part.raet", "Did you mean 'rate'"),
        (node(size="three"), "part.size", "must be an integer"),
        (node(size=True), "part.size", "must be an integer"),
        (node(size=3, mode="c"), "part.mode", "must be one of a, b"),
        (node(size="???"), "part.size", "is required"),
        (node(), "part.size", "is required"),
        (node(size=3, inner=node(size=3, x=1)), "part.inner.x", "no argument 'x'"),
        (node(size=3, inner=[node(size=3), node(size="x")]), "part.inner.1.size", "must be an integer"),
        ({"a": {"b": node(size=3, x=1)}}, "part.a.b.x", "no argument 'x'"),
        ({"_target_": "nowhere.Thing"}, "part._target_", "No module named 'nowhere'"),
        ({"_target_": f"{HERE}.Thng"}, "part._target_", "cannot be imported"),
        ({"_target_": None}, "part._target_", "dotted path of a class"),
        ({"_target_": "???"}, "part._target_", "is required. Give one on the command line: part._target_="),
    ],
)
def test_mistake_is_refused_at_its_path_and_once(given: Any, path: str, says: str, caplog: Any) -> None:
    error = refusal(given)
    assert not caplog.text
    assert error.path == path and says in f"{error.rule}. {error.remedy}"


def test_part_without_a_class_is_refused() -> None:
    with pytest.raises(ConfigError, match="the class that is built") as caught:
        instantiate({"size": 3}, "part")
    assert caught.value.path == "part._target_"


def test_refusal_of_a_constructor_comes_through_on_one_line_and_a_missing_package_with_its_extra() -> None:
    for size, path, says in (
        (101, "part", "size 101 is too large"),
        (100, "thing.size", "Write 99"),
        (99, "part", "not installed"),
    ):
        with pytest.raises(ConfigError) as caught:
            instantiate(node(size=size), "part")
        assert caught.value.path == path and says in f"{caught.value.rule}. {caught.value.remedy}"
        assert "second line" not in caught.value.rule
    with pytest.raises(ConfigError) as caught:
        instantiate(node(size=99), "logger.wandb")
    assert caught.value.remedy == "pip install 'blockwright[wandb]'"


@pytest.mark.parametrize("target", ["os.system", "builtins.eval", "subprocess.run"])
def test_call_of_a_shell_is_refused_in_ones_own_configuration_too(target: str) -> None:
    with pytest.raises(ConfigError):
        instantiate({"_target_": target, "_args_": ["true"]}, "part")
