"""From a node to a block: strict keys, children by scope, and refusals that say where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from blockwright.registry import (
    BlockError,
    Composable,
    ConfigError,
    Node,
    RegistrationError,
    Scope,
    as_written,
    build,
    did_you_mean,
    family,
    refuse_targets,
    register,
    resolve,
    to_plain,
    walk,
)
from blockwright.registry.layout import patched

BROKEN = {"wrong": RuntimeError("no such luck"), "type": TypeError("odd"), "memory": MemoryError("full")}


# Two small families of a plug-in: hulls, and motors that hulls receive.


class Motor(Composable):
    pass


class Hull(Composable):
    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"power": known["length"] * (2 if child == "spare" else 1)}


class Steam(Motor):
    """Burns coal.

    Args:
        boilers: how many
        fuel: what burns
        sizes: of the boilers
    """

    def __init__(
        self,
        power: int,
        boilers: int = 2,
        fuel: Literal["coal", "oil"] = "coal",
        sizes: list[int] | None = None,
        failure: str | None = None,
    ) -> None:
        if failure in BROKEN:
            raise BROKEN[failure]
        if boilers > 9:
            raise BlockError("boilers", boilers, "at most nine fit", "Take nine")
        if power > 1000:
            raise BlockError("power", power, "too strong", "Shorten the hull")
        self.power, self.boilers, self.fuel, self.sizes = power, boilers, fuel, sizes


class Sail(Motor):
    """Needs wind."""

    def __init__(self, power: int) -> None:
        self.power = power


class Liner(Hull):
    """A big one.

    Args:
        length: in metres
        motor: drives it
        spare: drives it when the other does not
        tender: carries people to it
    """

    def __init__(
        self, d_model: int, length: int, motor: Motor, spare: Motor | None = None, tender: Hull | None = None
    ) -> None:
        self.d_model, self.length, self.motor, self.spare, self.tender = d_model, length, motor, spare, tender


class Barge(Hull):
    """Flat.

    Args:
        length: in metres
        motor: drives it
    """

    def __init__(self, length: int, motor: Motor) -> None:
        self.motor = motor


@pytest.fixture(autouse=True)
def ships(temporary_blocks: None) -> None:
    family("motor", context=("power",))(Motor)
    family("hull")(Hull)
    for kind, cls in (("motor", Steam), ("motor", Sail), ("hull", Liner), ("hull", Barge)):
        register(kind, cls.__name__.lower())(cls)


def made(node: Any, **nodes: Any) -> Any:
    scope = Scope({k: Node(v, f"model.{k}") for k, v in nodes.items()}, {"d_model": 4, "n_layers": 1, "layer_idx": 0})
    return build("hull", Node(node, "model.hull"), scope)


def refusal(node: Any, **nodes: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        made(node, **nodes)
    assert caught.value.path and caught.value.rule and caught.value.remedy
    return caught.value


LINER = {"name": "liner", "length": 7}


# --- scope ------------------------------------------------------------------------------------------------------------


def test_child_is_found_in_the_own_node_first() -> None:
    hull = made({**LINER, "motor": "sail"}, motor="steam")
    assert type(hull.motor).__name__ == "Sail"


def test_child_is_found_by_the_parameters_name_before_the_kind() -> None:
    hull = made(LINER, motor="steam", spare="sail")
    assert (type(hull.motor).__name__, type(hull.spare).__name__) == ("Steam", "Sail")


def test_written_null_means_none_whatever_the_scope_has() -> None:
    assert made({**LINER, "spare": None}, motor="steam", spare="sail").spare is None
    assert made({**LINER, "tender": None, "spare": "inherit"}, motor="steam", spare="sail").spare is not None


def test_null_is_refused_for_a_child_that_the_block_needs() -> None:
    error = refusal({**LINER, "motor": None}, motor="steam")
    assert (error.path, error.value) == ("model.hull.motor", "null")
    assert "liner" in error.rule and "requires" in error.rule and "Leave it out" in error.remedy


def test_inherit_is_the_same_as_leaving_a_child_out() -> None:
    hull = made({**LINER, "motor": "inherit"}, motor={"name": "steam", "boilers": 5})
    assert hull.motor.boilers == 5
    assert refusal({**LINER, "motor": "inherit"}).path == "model.motor"
    tender = {"name": "barge", "length": 2, "motor": "inherit"}
    left = {"name": "liner", "length": 7, "tender": {"name": "barge", "length": 2}, "spare": None}
    assert as_written("hull", {**LINER, "motor": "inherit", "tender": tender, "spare": None}) == left


def test_patch_takes_a_child_away_and_gives_it_back() -> None:
    hull = {**LINER, "spare": {"name": "steam", "boilers": 5}}
    nodes = {"motor": "sail", "spare": "sail"}
    assert made(patched(hull, {"spare": None}), **nodes).spare is None
    assert type(made(patched(hull, {"spare": "inherit"}), **nodes).spare).__name__ == "Sail"
    few = made(patched({**LINER, "spare": "inherit"}, {"spare": {"boilers": 3}}), motor="sail", spare="steam")
    assert few.spare.boilers == 3


def test_name_that_means_a_missing_child_names_no_block() -> None:
    with pytest.raises(RegistrationError, match="inherit"):
        register("motor", "inherit")(Sail)


def test_walk_meets_the_blocks_that_build_makes() -> None:
    scope = {"motor": Node("steam", "model.motor"), "spare": Node("sail", "model.spare")}
    met = [(n.path, e.name) for n, e, _ in walk("hull", Node({**LINER, "tender": LINER}, "model.hull"), scope)]
    assert met == [("model.hull", "liner"), ("model.motor", "steam"), ("model.spare", "sail")]
    met = [e.name for _, e, _ in walk("hull", Node({**LINER, "spare": None}, "model.hull"), scope)]
    assert met == ["liner", "steam"]


def test_optional_child_is_never_found_by_its_kind() -> None:
    hull = made(LINER, motor="steam", hull=LINER)
    assert hull.spare is None and hull.tender is None


def test_needed_child_is_found_by_its_kind() -> None:
    hull = made({"name": "barge", "length": 3}, motor="steam")
    assert type(hull.motor).__name__ == "Steam" and hull.motor.power == 3


def test_missing_child_is_asked_for_with_its_options() -> None:
    error = refusal(LINER)
    assert error.path == "model.motor" and "liner" in error.rule
    assert error.remedy == "Add one: +model/motor=<sail|steam>; without the + where a preset has one"


def test_node_without_a_name_patches_the_one_outside() -> None:
    outside = {"name": "steam", "boilers": 3, "fuel": "oil"}
    motor = made({**LINER, "motor": {"boilers": 5}}, motor=outside).motor
    assert (motor.boilers, motor.fuel) == (5, "oil")
    assert outside == {"name": "steam", "boilers": 3, "fuel": "oil"}
    assert made({**LINER, "motor": {"boilers": 5}}, motor="steam").motor.boilers == 5


def test_node_without_a_name_and_nothing_outside_is_refused() -> None:
    error = refusal({**LINER, "motor": {"boilers": 5}})
    assert error.path == "model.hull.motor" and "sail, steam" in error.remedy


def test_mistake_in_a_patch_stands_where_the_patch_does() -> None:
    error = refusal({**LINER, "motor": {"boiler": 5}}, motor="steam")
    assert error.path == "model.hull.motor.boiler" and "'boilers'" in error.remedy


def test_parent_tells_its_children_what_it_knows() -> None:
    hull = made({**LINER, "spare": "sail"}, motor="steam")
    assert (hull.d_model, hull.motor.power, hull.spare.power) == (4, 7, 14)


def test_block_that_contains_itself_is_refused_with_the_chain() -> None:
    error = refusal({**LINER, "tender": LINER}, motor="sail")
    assert error.path == "model.hull.tender" and "hull liner → hull liner" in error.rule


# --- strictness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "path", "value", "rule", "remedy"),
    [
        (None, "model.hull", None, "must name a registered hull", "barge, liner"),
        (7, "model.hull", 7, "must name a registered hull", "liner"),
        (["liner"], "model.hull", ["liner"], "must name a registered hull", "liner"),
        ({}, "model.hull", {}, "must name a registered hull", "liner"),
        ("lyner", "model.hull.name", "lyner", "no hull is registered", "'liner'"),
        ({"name": 3}, "model.hull.name", 3, "no hull is registered", "liner"),
        ({"name": None}, "model.hull.name", None, "no hull is registered", "liner"),
        ({"name": {"a": 1}}, "model.hull.name", {"a": 1}, "no hull is registered", "liner"),
        ({"name": "steam"}, "model.hull.name", "steam", "no hull is registered", "liner"),
        ("liner", "model.hull.length", "???", "requires it: in metres", "model.hull.length=<int>"),
        ({"name": "liner", "length": "???"}, "model.hull.length", "???", "requires it", "model.hull.length=<int>"),
        ({"name": "liner", "length": None}, "model.hull.length", None, "must be an integer", "length: int"),
        ({"name": "liner", "length": "7"}, "model.hull.length", "7", "must be an integer", "length: int"),
        ({"name": "liner", "length": True}, "model.hull.length", True, "must be an integer", "length: int"),
        ({"name": "liner", "length": 7.0}, "model.hull.length", 7.0, "must be an integer", "length: int"),
        ({**LINER, "lenght": 3}, "model.hull.lenght", 3, "has no parameter 'lenght'", "'length'"),
        ({**LINER, 3: 4}, "model.hull.3", 4, "has no parameter 3", "length"),
        ({**LINER, "d_model": 3}, "model.hull.d_model", 3, "supplied by the composer", "length"),
        ({**LINER, "self": 3}, "model.hull.self", 3, "has no parameter", "length"),
        ({**LINER, "motor": 3}, "model.hull.motor", 3, "must name a registered motor", "sail, steam"),
        ({**LINER, "motor": "stream"}, "model.hull.motor.name", "stream", "no motor", "'steam'"),
        ({**LINER, "motor": {"name": "sail", "power": 3}}, "model.hull.motor.power", 3, "supplied", "no parameters"),
        ({**LINER, "spare": {"name": "steam", "fuel": "gas"}}, "model.hull.spare.fuel", "gas", "coal, oil", "Literal"),
        ({**LINER, "spare": {"name": "steam", "sizes": [1, "2"]}}, "model.hull.spare.sizes", [1, "2"], "list", "list"),
        ({**LINER, "spare": {"name": "steam", "boilers": 10}}, "model.hull.spare.boilers", 10, "nine fit", "Take nine"),
        ({"name": "liner", "length": 2000}, "model.motor", "steam", "power = 2000", "Shorten"),  # of context
    ],
    ids=str,
)  # fmt: skip
def test_mistake_is_refused_at_its_path(node: Any, path: str, value: Any, rule: str, remedy: str) -> None:
    error = refusal(node, motor="steam")
    assert (error.path, error.value) == (path, value)
    assert rule in error.rule and remedy in error.remedy


@pytest.mark.parametrize("failure", BROKEN)
def test_exception_of_a_plug_ins_constructor_becomes_a_refusal_with_its_path_and_words(failure: str) -> None:
    error = refusal({**LINER, "spare": {"name": "steam", "failure": failure}}, motor="sail")
    assert error.path == "model.hull.spare"
    assert f"{type(BROKEN[failure]).__name__}: {BROKEN[failure]}" in error.rule and "motor 'steam'" in error.rule
    assert error.value["failure"] == failure


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_a_constructor_is_no_mistake_of_the_config(
    monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    monkeypatch.setitem(BROKEN, "interrupt", interrupt())
    with pytest.raises(interrupt):
        made({**LINER, "motor": {"name": "steam", "failure": "interrupt"}})


def test_defaults_and_given_values_reach_the_constructor() -> None:
    motor = made({**LINER, "motor": {"name": "steam", "fuel": "oil", "sizes": [1, 2]}}).motor
    assert (motor.boilers, motor.fuel, motor.sizes) == (2, "oil", [1, 2])


def test_default_value_written_out_is_the_default() -> None:
    assert made({**LINER, "motor": {"name": "steam", "boilers": 2, "sizes": None}}).motor.sizes is None


def test_resolve_gives_parameters_and_leaves_children_as_written() -> None:
    entry, given = resolve("hull", Node({**LINER, "motor": {"boilers": 3}}, "model.hull"))
    assert entry.name == "liner"
    assert given == {"length": 7, "motor": {"boilers": 3}, "spare": "inherit", "tender": "inherit"}


# --- plain types ------------------------------------------------------------------------------------------------------


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=5), PLAIN, max_size=4))
def test_plain_data_are_what_omegaconf_makes_of_them(data: dict[str, Any]) -> None:
    assume("${" not in repr(data))
    made = OmegaConf.to_container(OmegaConf.create(data))
    assert repr(to_plain(data)) == repr(made)  # not ==: NaN


def test_plain_types_come_out_of_yaml_mappings_and_omegaconf() -> None:
    expected = {"a": 1, "b": {"c": [1, 1]}}
    refers = OmegaConf.create({"a": 1, "b": {"c": [1, "${a}"]}})
    for form in ("a: 1\nb: {c: [1, 1]}", {"a": 1, "b": {"c": [1, 1]}}, refers):
        assert to_plain(form) == expected
        assert type(to_plain(form)["b"]) is dict and type(to_plain(form)["b"]["c"]) is list


@pytest.mark.parametrize("form", ["a: 1\nb: '${a}'", {"a": 1, "b": "${a}"}, {"${a}": 1}, {"b": ["${oc.env:HOME}"]}])
def test_text_and_mappings_are_data_and_refer_to_nothing(form: Any) -> None:
    with pytest.raises(ConfigError, match="is an interpolation"):
        to_plain(form)


def test_node_of_a_whole_sees_the_whole() -> None:
    whole = OmegaConf.create({"seed": 5, "model": {"a": "${seed}"}})
    assert to_plain(whole.model) == {"a": 5}


@pytest.mark.parametrize("text", ["a: [", "\tb", "a: ${b}", "a: ${oc.nothing:1}", "a: !!python/name:os.system"])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        to_plain(text)
    assert caught.value.rule and caught.value.remedy


@pytest.mark.parametrize("value", [{"a": {"_target_": 1}}, {"a": [{"_target_": 1}]}, {"a": [[{"_x": 1}]]}])
def test_target_is_found_at_any_depth(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_targets(value, "model")
    assert caught.value.path.startswith("model.a") and "registered" in caught.value.rule
    refuse_targets({"a": [{"b_": "_target_"}]}, "model")  # a value is no key


# --- errors -----------------------------------------------------------------------------------------------------------


def test_refusal_reads_as_path_value_rule_and_remedy() -> None:
    error = ConfigError("model.x", "y" * 300, "must be short", "Write less")
    assert str(error).startswith("model.x = 'yyy") and str(error).endswith(": must be short. Write less")
    lines = error.render().splitlines()
    assert lines[0].startswith("error: model.x = yyy") and len(lines[0]) < 250
    assert lines[1:] == ["  rule:   must be short", "  remedy: Write less"]


def test_nearest_name_comes_first_and_all_follow() -> None:
    assert did_you_mean("mlaa", ["gqa", "mla"]) == "Did you mean 'mla'? Known: gqa, mla"
    assert did_you_mean("zzz", ["gqa", "mla"]) == "Known: gqa, mla"
    assert did_you_mean("zzz", [], "Nothing is") == "Nothing is"
    assert did_you_mean(None, ["a"]) == "Known: a"
