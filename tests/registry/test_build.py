"""From a node to a block: strict keys, children by scope, and refusals that say where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from blockwright.blocks.compose import compose, preset
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
    to_plain,
    walk,
)
from blockwright.registry.layout import patched
from blockwright.registry.recording import Built, recorded

BROKEN = {"wrong": RuntimeError("no such luck"), "type": TypeError("odd"), "memory": MemoryError("full")}


# Two small families of a plug-in: hulls, and motors that hulls receive.


class Motor(Composable):
    pass


class Hull(Composable):
    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"power": known["length"] * (2 if child == "spare" else 1)}


class Steam(Motor):
    """Burns coal."""

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
    """A big one."""

    def __init__(
        self, d_model: int, length: int, motor: Motor, spare: Motor | None = None, tender: Hull | None = None
    ) -> None:
        self.d_model, self.length, self.motor, self.spare, self.tender = d_model, length, motor, spare, tender


class Barge(Hull):
    """Flat."""

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


def motors(hull: Any) -> list[str | None]:
    return [one and type(one).__name__.lower() for one in (hull.motor, hull.spare)]


# --- scope ------------------------------------------------------------------------------------------------------------

NO_SPARE: dict[str, Any] = {**LINER, "spare": None}
OWN_SPARE: dict[str, Any] = {**LINER, "spare": {"name": "steam", "boilers": 5}}
FOUND: list[tuple[dict[str, Any], dict[str, Any], list[str | None]]] = [
    ({**LINER, "motor": "sail"}, {"motor": "steam"}, ["sail", None]),  # in the own node first
    (LINER, {"motor": "steam", "spare": "sail"}, ["steam", "sail"]),  # by the parameter's name before the kind
    (LINER, {"motor": "steam", "hull": LINER}, ["steam", None]),  # an optional one never by its kind
    ({**LINER, "motor": "inherit"}, {"motor": "steam"}, ["steam", None]),
    (NO_SPARE, {"motor": "steam", "spare": "sail"}, ["steam", None]),  # null means none, whatever is outside
    ({**LINER, "tender": None, "spare": "inherit"}, {"motor": "steam", "spare": "sail"}, ["steam", "sail"]),
    (patched(OWN_SPARE, {"spare": None}), {"motor": "sail", "spare": "sail"}, ["sail", None]),
    (patched(OWN_SPARE, {"spare": "inherit"}), {"motor": "sail", "spare": "sail"}, ["sail", "sail"]),
]


def test_child_is_found_by_its_place_its_name_and_what_is_outside() -> None:
    for node, nodes, expected in FOUND:
        assert motors(made(node, **nodes)) == expected, (node, nodes)
    barge = made({"name": "barge", "length": 3}, motor="steam")
    assert type(barge.motor).__name__ == "Steam" and barge.motor.power == 3
    hull = made({**LINER, "spare": "sail"}, motor="steam")  # a parent gives its children what it knows
    assert (hull.d_model, hull.motor.power, hull.spare.power) == (4, 7, 14)


def test_inherit_is_the_same_as_leaving_a_child_out() -> None:
    tender = {"name": "barge", "length": 2, "motor": "inherit"}
    left = {"name": "liner", "length": 7, "tender": {"name": "barge", "length": 2}, "spare": None}
    assert as_written("hull", {**LINER, "motor": "inherit", "tender": tender, "spare": None}) == left
    with pytest.raises(RegistrationError, match="inherit"):
        register("motor", "inherit")(Sail)


def test_node_without_a_name_patches_the_one_outside() -> None:
    outside = {"name": "steam", "boilers": 3, "fuel": "oil"}
    motor = made({**LINER, "motor": {"boilers": 5, "sizes": [1, 2]}}, motor=outside).motor
    assert (motor.boilers, motor.fuel, motor.sizes) == (5, "oil", [1, 2])
    assert outside == {"name": "steam", "boilers": 3, "fuel": "oil"}
    assert made({**LINER, "motor": {"boilers": 5, "sizes": None}}, motor="steam").motor.boilers == 5
    few = made(patched({**LINER, "spare": "inherit"}, {"spare": {"boilers": 3}}), motor="sail", spare="steam").spare
    assert (few.boilers, few.fuel, few.sizes) == (3, "coal", None)


def test_walk_meets_the_blocks_that_build_makes() -> None:
    scope = {"motor": Node("steam", "model.motor"), "spare": Node("sail", "model.spare")}
    met = [(n.path, e.name) for n, e, _ in walk("hull", Node({**LINER, "tender": LINER}, "model.hull"), scope)]
    assert met == [("model.hull", "liner"), ("model.motor", "steam"), ("model.spare", "sail")]
    assert [e.name for _, e, _ in walk("hull", Node(NO_SPARE, "model.hull"), scope)] == ["liner", "steam"]


# --- strictness -------------------------------------------------------------------------------------------------------

SPARE, H = "model.hull.spare", "model.hull"
MISTAKES: list[tuple[Any, str, Any]] = [
    *((node, H, node) for node in (None, 7, ["liner"], {})),
    ("lyner", f"{H}.name", "lyner"),
    *(({"name": name}, f"{H}.name", name) for name in (3, None, {"a": 1}, "steam")),
    ("liner", f"{H}.length", "???"),
    *(({"name": "liner", "length": n}, f"{H}.length", n) for n in ("???", None, "7", True, 7.0)),
    ({**LINER, "lenght": 3}, f"{H}.lenght", 3),
    ({**LINER, 3: 4}, f"{H}.3", 4),
    ({**LINER, "d_model": 3}, f"{H}.d_model", 3),
    ({**LINER, "self": 3}, f"{H}.self", 3),
    ({**LINER, "motor": None}, f"{H}.motor", "null"),
    ({**LINER, "motor": 3}, f"{H}.motor", 3),
    ({**LINER, "motor": "stream"}, f"{H}.motor.name", "stream"),
    ({**LINER, "motor": {"boiler": 5}}, f"{H}.motor.boiler", 5),
    ({**LINER, "motor": {"name": "sail", "power": 3}}, f"{H}.motor.power", 3),
    ({**LINER, "spare": {"name": "steam", "fuel": "gas"}}, f"{SPARE}.fuel", "gas"),
    ({**LINER, "spare": {"name": "steam", "sizes": [1, "2"]}}, f"{SPARE}.sizes", [1, "2"]),
    ({**LINER, "spare": {"name": "steam", "boilers": 10}}, f"{SPARE}.boilers", 10),
    ({"name": "liner", "length": 2000}, "model.motor", "steam"),  # of context
]


def test_mistake_is_refused_at_its_path() -> None:
    for node, path, value in MISTAKES:
        error = refusal(node, motor="steam")
        assert (error.path, error.value) == (path, value), node
    assert "'length'" in refusal({**LINER, "lenght": 3}, motor="steam").remedy
    chain = refusal({**LINER, "tender": LINER}, motor="sail")
    assert chain.path == f"{H}.tender" and "hull liner → hull liner" in chain.rule


def test_missing_child_is_asked_for_with_its_options() -> None:
    for node in (LINER, {**LINER, "motor": "inherit"}):
        error = refusal(node)
        assert error.path == "model.motor" and "+model/motor=<sail|steam>" in error.remedy
    error = refusal({**LINER, "motor": {"boilers": 5}})
    assert error.path == f"{H}.motor" and "sail, steam" in error.remedy


def test_exception_of_a_plug_ins_constructor_becomes_a_refusal_with_its_path_and_words() -> None:
    for failure, raised in BROKEN.items():
        error = refusal({**LINER, "spare": {"name": "steam", "failure": failure}}, motor="sail")
        assert error.path == SPARE and error.value["failure"] == failure
        assert f"{type(raised).__name__}: {raised}" in error.rule and "motor 'steam'" in error.rule


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_interrupt_in_a_constructor_is_no_mistake_of_the_config(
    monkeypatch: pytest.MonkeyPatch, interrupt: type[BaseException]
) -> None:
    monkeypatch.setitem(BROKEN, "interrupt", interrupt())
    with pytest.raises(interrupt):
        made({**LINER, "motor": {"name": "steam", "failure": "interrupt"}})


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
    refers = OmegaConf.create({"a": 1, "b": {"c": [1, "${a}"]}})
    for form in ("a: 1\nb: {c: [1, 1]}", {"a": 1, "b": {"c": [1, 1]}}, refers):
        assert to_plain(form) == {"a": 1, "b": {"c": [1, 1]}}
        assert type(to_plain(form)["b"]) is dict and type(to_plain(form)["b"]["c"]) is list
    assert to_plain(OmegaConf.create({"seed": 5, "model": {"a": "${seed}"}}).model) == {"a": 5}


UNREADABLE: list[Any] = ["a: [", "\tb", "a: ${b}", "a: ${oc.nothing:1}", "a: !!python/name:os.system"]
UNREADABLE += [
    "a: 1\nb: '${a}'",
    {"a": 1, "b": "${a}"},
    {"${a}": 1},
    {"b": ["${oc.env:HOME}"]},
]  # data refer to nothing


@pytest.mark.parametrize("form", UNREADABLE, ids=str)
def test_what_cannot_be_read_or_refers_is_refused(form: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        to_plain(form)
    assert caught.value.rule and caught.value.remedy


def test_target_is_found_at_any_depth() -> None:
    for value in ({"a": {"_target_": 1}}, {"a": [{"_target_": 1}]}, {"a": [[{"_x": 1}]]}):
        with pytest.raises(ConfigError) as caught:
            refuse_targets(value, "model")
        assert caught.value.path.startswith("model.a")
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
    assert did_you_mean("zzz", [], "Nothing is") == "Nothing is" and did_you_mean(None, ["a"]) == "Known: a"


# --- records of what was built ----------------------------------------------------------------------------------------

LOSSES = {"name": "softmax_topk", "top_k": 4, "balance": ["expert", "z_loss"]}
MODEL: dict[str, Any] = {"vocab_size": 257, "n_layers": 2, "gating": LOSSES}


def test_what_was_built_is_recorded_with_its_settled_values_and_its_children_by_their_places() -> None:
    with recorded() as records:
        decoder = compose(preset("tiny", MODEL), device="meta")
    with recorded() as others:
        pass
    compose(preset("tiny", MODEL), device="meta")  # outside
    assert records and others == {}
    built: dict[str, Built] = {p: records[id(m)] for p, m in decoder.named_modules() if id(m) in records}
    attention, names = built["layers.0.attention"], {id(b.block): b.entry.name for b in built.values()}
    assert attention.settings["v_head_dim"] is None and attention.settled("v_head_dim") == 24
    assert attention.settings["q_lora_rank"] is None and attention.settled("q_lora_rank") is None
    assert attention.settled("kv_lora_rank") == attention.settings["kv_lora_rank"]
    assert None in attention.children.values() and None not in dict(attention.slots()).values()
    (gating,) = [each for each in built.values() if each.entry.kind == "gating"]
    slots = [(slot, names[id(child)]) for slot, child in gating.slots()]
    assert slots == [("balance.0", "expert"), ("balance.1", "z_loss")]
