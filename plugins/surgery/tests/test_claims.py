"""Every claim of every operator of surgery, checked against the logits: compositions that differ in any one setting.

The settings are those of the schemas: of every block in the examples of every registered operator, of every registered
block, and of a model. So a new block, a new setting and a new operator are tested as they are registered.
"""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple, get_args, get_type_hints
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.compose import ModelConfig, compose
from blockwright.blocks.conformance.hyperparameters import alternatives
from blockwright.blocks.conformance.setting import Setting
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.surgery.ledger import TOLERANCE, Ledger, Line, Operation, _Apart, _line
from blockwright.plugins.surgery.operating import build, operate, plan
from blockwright.plugins.surgery.probing import random_batches
from blockwright.plugins.surgery.transplant.base import DENSE, Transplant, Transplanted
from blockwright.registry import ConfigError, Node, Scope
from blockwright.registry.ranges import parts
from blockwright.registry.schema import Parameter

Model = dict[str, Any]
SIDES = ("new", "old", "both")
VALUES = 2  # tried of each setting
SAMPLE = 4  # pairs of the default run
OPERATORS = registry.names("transplant")
KINDS = [kind for kind in registry.kinds() if not Setting(kind, registry.names(kind)[0]).of_input]


class Pair(NamedTuple):
    """Two compositions that differ by an operator and one setting, or by one setting alone."""

    what: str
    old: Model
    new: Model
    named: str | None = None
    growth: str = "zeroed"


# --- pairs ------------------------------------------------------------------------------------------------------------


def of_operator(name: str) -> Iterator[Pair]:
    """Its example, and the example with one setting changed in the new model, in the old one, or in both."""
    before, after = registry.lookup("transplant", name).cls.example  # type: ignore[attr-defined]
    old, new = {**DENSE, **before}, {**DENSE, **before, **after}
    named = None if registry.lookup("transplant", name).cls.automatic else name  # type: ignore[attr-defined]
    yield Pair(name, old, new, named)
    for side in SIDES:
        changed = _others(new if side != "old" else old)
        for what, put in changed:
            sides = [put(model) if side in (own, "both") else model for own, model in (("old", old), ("new", new))]
            yield Pair(f"{name}, {side}: {what}", *sides, named)


def of_blocks(kind: str) -> Iterator[Pair]:
    """Every block of a kind, and the same with another value of one of its own settings; and at another depth."""
    for name in registry.names(kind):
        setting = Setting(kind, name)
        model, node = setting.model(), setting.node()
        for growth in registry.names("growth"):
            yield Pair(f"{kind}/{name}: {growth}", model, setting.model(n_layers=3), None, growth)
        for p in registry.lookup(kind, name).schema.parameters.values():
            for value in _spread(alternatives(p, node.get(p.name, None if p.required else p.default))):
                yield Pair(f"{kind}/{name}: {p.name}={value}", model, setting.model({**node, p.name: value}))


def _others(model: Model) -> Iterator[tuple[str, Any]]:
    """Each setting of a composition with another value, and what puts it into a composition."""
    scope = {kind: Node(model[kind], f"model.{kind}") for kind in registry.kinds() if kind in model}
    seen = set()
    for kind, top in scope.items():
        for node, entry, given in registry.walk(kind, top, scope):
            for p in entry.schema.parameters.values() if node.path not in seen else ():
                for value in _spread(alternatives(p, given[p.name])):
                    yield f"{node.path}.{p.name}={value}", _putting(node, p.name, value)
            seen.add(node.path)
    for p in _of_models():
        for value in _spread(alternatives(p, model.get(p.name, p.default))):
            yield f"model.{p.name}={value}", lambda to, key=p.name, value=value: {**to, key: value}


def _putting(node: Node, key: str, value: Any) -> Any:
    def put(model: Model) -> Model:
        changed = copy.deepcopy(model)
        place: Any = changed
        *outer, last = node.path.split(".")[1:]
        for name in outer:
            place[name] = {"name": place[name]} if isinstance(place[name], str) else place[name]
            place = place[name]
        own = place.get(last, node.value)
        place[last] = {**({"name": own} if isinstance(own, str) else own), key: value}
        return changed

    return put


def _of_models() -> Iterator[Parameter]:
    """The keys of a model that are no blocks, numbers and switches."""
    hints, annotations = get_type_hints(ModelConfig), get_type_hints(ModelConfig, include_extras=True)
    for f in fields(ModelConfig):
        hint = parts(hints[f.name])[0]
        if {int, float, bool} & {hint, *get_args(hint)} and f.name != "format":
            yield Parameter(f.name, hint, annotations[f.name], f.default, None, "")


def _spread(values: Iterator[Any]) -> list[Any]:
    """A near value and a far one: a bound on large values shows only where it is small."""
    found = list(itertools.islice(values, 12))
    return [found[i] for i in dict.fromkeys((0, len(found) - 1))][:VALUES] if found else []


# --- holding ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)  # most pairs begin with the same
def trained(model: str) -> Decoder:
    """A decoder whose every parameter has an effect."""
    decoder = compose(json.loads(model), seed=1).eval()
    for index, parameter in enumerate(p for p in decoder.parameters() if p.ndim < 2):
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)), alpha=0.2)
    return decoder


def operated(pair: Pair) -> tuple[Decoder, Decoder, Ledger]:
    old, new = trained(json.dumps(pair.old)), compose(pair.new, seed=2).eval()
    return old, new, filled(pair, old, new)


def filled(pair: Pair, old: Decoder, new: Decoder) -> Ledger:
    growth = registry.build("growth", Node(pair.growth, "surgery.growth"), Scope({}, {}))
    named = [(pair.named, build(pair.named, "surgery.transplant"))] if pair.named else []
    text = torch.randint(pair.old["vocab_size"], (2, 33), generator=torch.Generator().manual_seed(5))
    return operate(old, new, plan(old, new, named, growth), growth, lambda: [{"tokens": text}], 0)


@torch.no_grad()
def apart(old: Decoder, new: Decoder, seed: int) -> float:
    """Largest difference of a logit over the largest logit, computed as simply as can be."""
    seen: list[tuple[Tensor, Tensor]] = []
    for batch in random_batches(old, new, 1, seed=seed):
        given = batch.tokens, batch.positions, batch.segments
        seen.append((old(*given), new(*given)))
    return max(float((b - a).abs().max()) for a, b in seen) / max(float(a.abs().max()) for a, _ in seen)


def held(pair: Pair) -> bool:
    """Hold a pair's claims to its logits; False if one of the compositions is invalid, or all is refused."""
    try:
        old, new = trained(json.dumps(pair.old)), compose(pair.new, seed=2).eval()
    except ConfigError:
        return False
    try:
        ledger = filled(pair, old, new)
    except ConfigError as refusal:
        assert refusal.path.startswith(("model.", "surgery.")) and refusal.rule and refusal.remedy, pair.what
        return False
    assert not ledger.errors, (pair.what, ledger.report())
    assert ledger.together.difference is not None, pair.what
    measured = apart(old, new, seed=0)
    assert measured == pytest.approx(ledger.together.difference, rel=1e-3, abs=1e-7), pair.what
    if ledger.exact:
        assert apart(old, new, seed=9) <= TOLERANCE, (pair.what, ledger.report())  # on tokens that it has not seen
    return True


# --- the cases that were wrong ----------------------------------------------------------------------------------------

GQA: Model = {"name": "gqa", "n_heads": 4, "n_kv_heads": 2}
MHA: Model = {"name": "mha", "n_heads": 4}
WINDOW: Model = {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 4, "window": 64}
NARROW: Model = {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 8}
WIDE: Model = {
    "d_model": 64,
    "attention": {**GQA, "n_heads": 8, "n_kv_heads": 4},
    "ffn": {"name": "swiglu", "d_ff": 96},
}
LATENT: Model = dict(registry.lookup("transplant", "latent").cls.example[1]["attention"])  # type: ignore[attr-defined]
MIXTURE: Model = dict(registry.lookup("transplant", "copies").cls.example[1])  # type: ignore[attr-defined]
DSA: Model = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 5}
FAR: Model = {"name": "rope", "theta": 5e5}
CAP: Model = {"scores": {"name": "softcap", "cap": 2.0}}


def bounded(d_ff: int, limit: float) -> Model:
    return {"ffn": {"name": "bounded_swiglu", "d_ff": d_ff, "limit": limit}}


def blocked(attention: Model, size: int) -> Model:
    return {"attention": {**attention, "selector": {"name": "block", "block_size": size, "top_k": 2}}}


def of(attention: Model, **changes: Any) -> Model:
    return {"attention": {**attention, **changes}}


# Old, new, and the setting that differs; the last are of kinds that others have shown.
OTHERS: list[tuple[Model, Model, str]] = [
    ({}, {**of(MHA), "position": FAR}, "position.theta"),
    ({}, of(MHA, **CAP), "scores"),
    (blocked(GQA, 4), blocked(MHA, 2), "selector.block_size"),
    (of(MHA), {**of(WINDOW), "position": FAR}, "position.theta"),
    (of(MHA), of(WINDOW, n_heads=2, n_kv_heads=2), "head_dim"),
    ({}, {**WIDE, **of(GQA, n_heads=8)}, ""),  # as many heads of keys as before
    ({}, {**WIDE, "norm": {"name": "rmsnorm", "eps": 1.0}}, "eps"),
    (of(NARROW), {**WIDE, **of(NARROW, n_heads=8, n_kv_heads=4, window=4)}, "window"),
    (bounded(48, 8.0), {**WIDE, **bounded(96, 0.5)}, "limit"),
    ({"position": "alibi"}, WIDE, "position.n_heads"),
    (of(GQA, selector=DSA), of(LATENT), "selector"),
    ({}, of(LATENT, selector=DSA), "selector"),
    (of(GQA, values="value_residual"), of(LATENT), "values"),
    (bounded(48, 0.5), MIXTURE, "name"),
    ({}, {**of(MHA), "position": {"name": "yarn", "factor": 4}}, "position"),
    ({}, {**of(MHA), "position": "alibi"}, "position"),
    ({}, {**of(MHA), "position": "none"}, "position"),
    (of(MHA), of(WINDOW, **CAP), "scores"),
    ({}, {**WIDE, "position": FAR}, "position.theta"),
    (of(GQA, selector=DSA), of(LATENT, selector=DSA), ""),
]


@pytest.mark.parametrize("rows", [OTHERS[:14], pytest.param(OTHERS[14:], marks=pytest.mark.slow)], ids=["", "further"])
def test_other_settings_are_not_called_exact(rows: list[tuple[Model, Model, str]]) -> None:
    for old, new, differs in rows:
        before, after, ledger = operated(Pair("", {**DENSE, **old}, {**DENSE, **old, **new}))
        assert apart(before, after, seed=3) > 1000 * TOLERANCE, new
        assert not ledger.exact and not ledger.errors, new
        settings = {path for operation in ledger.operations if not operation.claimed for path in operation.settings}
        assert not differs or differs in settings, new


# --- all of them ------------------------------------------------------------------------------------------------------


def test_every_operator_has_an_example_in_which_it_serves() -> None:
    for name in OPERATORS:
        _, _, ledger = operated(next(of_operator(name)))
        assert name in {operation.name for operation in ledger.operations} and not ledger.errors


def test_some_pairs_hold() -> None:
    draw = random.Random(0)
    listed = [*map(of_operator, draw.sample(OPERATORS, 3)), of_blocks(draw.choice(KINDS))]
    found = list(itertools.chain.from_iterable(listed))
    draw.shuffle(found)
    assert len(list(itertools.islice(filter(held, found), SAMPLE))) == SAMPLE


def number_held(pairs: Iterator[Pair], least: int) -> int:
    """How many of every fifteenth hold, all would take twenty minutes; where too few are valid, of all."""
    found = list(pairs)
    number = sum(map(held, found[::15]))
    return number if number >= least else len(list(itertools.islice(filter(held, found), least)))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_every_claim_of_an_operator_holds(name: str) -> None:
    assert number_held(of_operator(name), 2) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_of_a_kind_holds(kind: str) -> None:
    assert number_held(of_blocks(kind), 1) >= 1


# --- a claim that is wrong --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("temporary_blocks")
def test_wrong_claim_is_an_error_of_the_operator_and_never_exact() -> None:
    @registry.register("transplant", "careless")
    class Careless(Transplant):
        """Copies, and knows nothing."""

        handles = ("position",)

        def serves(self, old: nn.Module, new: nn.Module) -> bool:
            return hasattr(new, "position") and hasattr(new, "query")

        def __call__(self, old: nn.Module, new: nn.Module, setting: Any) -> Transplanted:
            return Transplanted(old.state_dict(), frozenset(), exact=True)

    _, _, ledger = operated(Pair("", dict(DENSE), {**DENSE, "position": FAR}))
    (line,) = (line for line in ledger.lines if line.operator == "careless")
    assert line.claimed and line.refuted and not line.exact and not ledger.exact
    assert "careless" in ledger.errors[0] and "position.theta 10000 → 500000" in ledger.errors[0]


def test_what_is_not_measured_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockwright.plugins.surgery.probing.FLOPS", 1e5)
    _, _, ledger = operated(Pair("", dict(DENSE), {**DENSE, "attention": MHA}))
    assert ledger.together.claimed and ledger.together.difference is None and not ledger.tokens
    assert not ledger.exact and "repeat_heads: not measured" in ledger.report()[0]


def test_claim_that_is_wrong_in_one_place_is_found_by_halves() -> None:
    class Counted(_Apart):
        def __init__(self, bad: int) -> None:
            self.bad, self.measured = f"layers.{bad}.attention", 0

        def line(self, name: str, group: Sequence[Operation]) -> Line:
            self.measured += 1
            return Line(name, tuple(group), 1.0 if self.bad in {o.path for o in group} else 0.0)

    done = [Operation(f"layers.{i}.attention", "careless", claimed=True) for i in range(64)]
    for bad in (0, 37, 63):
        apart = Counted(bad)
        assert _line("careless", done, apart).place == done[bad]
        assert apart.measured <= 1 + 2 * 6


def test_what_cannot_be_done_alone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    mixing, pair = Mock(), Pair("", dict(DENSE), {**DENSE, "attention": MHA})
    monkeypatch.setattr("blockwright.plugins.surgery.ledger.mixed", mixing)
    for error in (RuntimeError("a and b\nmore"), ValueError("a and b"), IndexError("a and b")):
        mixing.side_effect = error
        report = operated(pair)[2].report()[0]
        assert "repeat_heads: not measured" in report and "without the others (a and b)" in report
    mixing.side_effect = torch.OutOfMemoryError("too much")
    with pytest.raises(torch.OutOfMemoryError):
        operated(pair)


def test_a_window_is_passed() -> None:
    """Sequences reach past a window that differs."""
    model: Mapping[str, Any] = {**DENSE, "max_positions": 2000}
    windows = ({"attention": {**NARROW, "window": size}} for size in (700, 800))
    _, _, ledger = operated(Pair("", *({**model, **window} for window in windows)))
    assert not ledger.exact and (ledger.together.difference or 0) > TOLERANCE
