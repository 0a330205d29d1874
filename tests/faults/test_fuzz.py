"""Whole compositions out of everything registered, right and wrong: each works, or is refused in one way."""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from quickest import takes_less

from blockwright import registry
from blockwright.blocks.compose import check, compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError, presets
from blockwright.registry.pattern import expand
from blockwright.registry.schema import Parameter

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))  # FUZZ_EXAMPLES=50000 looks further, at random seeds
FUZZ = settings(
    max_examples=EXAMPLES or 40,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
built: dict[bool, int] = {True: 0, False: 0}
registry.load()
OF_PICTURES = ("images", "vision", "projector", "tiling")  # of decoders that see, which these models are not
KINDS = [kind for kind in registry.kinds() if kind not in OF_PICTURES]
SLOTS = ("attention", "ffn", "residual", "norm", "position", "gating", "experts")
SHAPES = ["{}", "{}*2", "{}*", "({} {})*", "2*{}", "({})*3", "{}**", "{}*-1", "({}", "{}, {}"]
SIZES = [1, 2, 3, 4, 6, 8, 12, 16, 24]
ODD: list[Any] = [0, -1, 7, 2**31, 2**63, 10**30, 0.5, 1e-9, 1e400, -0.0, float("nan"), True, None, "", "gqa", "???"]
ODD += ["x" * 50, [], [1], {}, {"name": "gqa"}, {"name": None}, [[]], "${a}", "1_0", "0x10", "yes"]


def plain(draw: Any, p: Parameter) -> Any:
    """A value of a parameter: of its type mostly, sometimes odd."""
    if draw(st.integers(0, 24)) == 0:
        return draw(st.sampled_from(ODD))
    options = [a for a in (get_args(p.hint) or (p.hint,)) if a is not type(None)]
    hint = options[0] if get_origin(p.hint) is not Literal else p.hint
    if get_origin(hint) is Literal:
        return draw(st.sampled_from(get_args(hint)))
    if hint is bool:
        return draw(st.booleans())
    if hint is int:
        return draw(st.sampled_from(SIZES))
    if hint is float:
        return draw(st.sampled_from([0.0, 0.001, 0.5, 1.0, 2.0, 8.0, 10000.0]))
    return draw(st.sampled_from([None, "silu", [1.0, 2.0], [1, 2], 4]))


def node(draw: Any, kind: str, depth: int = 0) -> Any:
    """A node of a kind: a name alone, or with some parameters and children."""
    name = draw(st.sampled_from(registry.names(kind)))
    made: dict[str, Any] = {"name": name}
    for p in registry.lookup(kind, name).schema.parameters.values():
        if p.child:
            if depth < 2 and draw(st.integers(0, 5)) == 0:
                made[p.name] = node(draw, p.child, depth + 1)
        elif p.required or draw(st.integers(0, 14)) == 0:  # of a dozen nodes with odd values few models are left
            made[p.name] = plain(draw, p)
    return name if len(made) == 1 and draw(st.booleans()) else made


ALWAYS = "attention", "position", "ffn", "gating", "experts", "norm", "residual"  # others are options


@st.composite
def patterns(draw: Any, words: list[str]) -> Any:
    """A layout pattern of these words: mostly well formed."""
    parts = []
    for _ in range(draw(st.integers(1, 4))):
        word = draw(st.sampled_from(words))
        parts.append(draw(st.sampled_from(SHAPES)).replace("{}", word))
    return parts if draw(st.integers(0, 6)) == 0 else " ".join(parts)


@st.composite
def models(draw: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "vocab_size": draw(st.sampled_from([11, 16])),
        "d_model": draw(st.sampled_from([8, 16, 24])),
        "n_layers": draw(st.sampled_from([1, 2, 3, 4])),
        "max_positions": 16,
        "init": {"std": 0.1, "depth_scaled": draw(st.booleans())},
    }
    for kind in KINDS:
        if kind in ALWAYS or draw(st.integers(0, 29)) == 0:
            model[kind] = node(draw, kind)
    for switch in ("tie_embeddings", "scale_embeddings"):
        if draw(st.integers(0, 3)) == 0:
            model[switch] = draw(st.booleans())
    if draw(st.integers(0, 5)) == 0:
        model["mtp"] = {"depth": draw(st.sampled_from([0, 1, 2])), "loss_weight": draw(st.sampled_from([0.3, 0, -1]))}
    if draw(st.integers(0, 5)) == 0:
        slot = draw(st.sampled_from(SLOTS))
        other = node(draw, slot)
        model["variants"] = {slot: {"other": other if isinstance(other, dict) else {"name": other}}}
        model["layout"] = {slot: draw(patterns(["other", slot]))}
    if draw(st.integers(0, 9)) == 0:
        slot = draw(st.sampled_from(SLOTS))
        layers = draw(st.sampled_from([0, -1, "0..1", [0, -1], "1..0", 99, "", [], None]))
        model["overrides"] = [{"layers": layers, slot: node(draw, slot)}]
    for _ in range(draw(st.sampled_from([0] * 7 + [1]))):
        model[draw(st.sampled_from([*model, "nonsense", "_target_"]))] = draw(st.sampled_from(ODD))
    return model


def holds(model: Any) -> bool:
    """Whether a model builds, in which case it works; else it is refused as it should be."""
    before, started = copy.deepcopy(model), time.process_time()
    try:
        decoder = compose(model, seed=1)
    except ConfigError as error:
        if time.process_time() - started > 1:  # imports and collected garbage take long once; what is slow stays slow
            again = time.process_time()
            with pytest.raises(ConfigError):
                compose(model, seed=1)
            assert time.process_time() - again < 1, "slow"
        assert error.path and error.rule and error.remedy and len(error.render()) < 4000
        return False
    assert str(model) == str(before), "a configuration was changed"
    works(decoder, model)
    return True


def works(decoder: Decoder, model: dict[str, Any]) -> None:
    ids = torch.randint(decoder.config["vocab_size"], (2, 6), generator=torch.Generator().manual_seed(0))
    hidden, routings = decoder.train().hidden(ids)
    balances = [v for r in routings if r is not None for v in r.losses.values()]
    loss = decoder.nll(hidden, ids.roll(-1, 1)) + sum(balances, torch.zeros(()))
    assert loss.isfinite(), "loss"
    loss.backward()
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None), "gradients"
    causal = all(getattr(module, "causal", True) for module in decoder.modules())
    if causal:
        decoder.eval()
        changed = ids.clone()
        changed[:, 4:] = (changed[:, 4:] + 1) % decoder.config["vocab_size"]
        with torch.no_grad():
            torch.testing.assert_close(decoder(changed)[:, :4], decoder(ids)[:, :4], atol=1e-4, rtol=1e-3)


@FUZZ
@given(models())
def compositions(model: dict[str, Any]) -> None:
    built[holds(model)] += 1


@pytest.mark.slow
def test_any_composition_works_or_is_refused() -> None:
    compositions()
    assert built[True] > 0.05 * sum(built.values()) and built[False] > 0.05 * sum(built.values()), built


@FUZZ
@given(st.integers(1, 12), patterns(["a", "b_2", "c"]) | st.text("ab*()0123, .", max_size=20) | st.sampled_from(ODD))
@example(3, "a*99999999999999999999")
def test_any_pattern_spells_the_depth_or_is_refused(n_layers: int, pattern: Any) -> None:
    try:
        names = expand(pattern, n_layers, "model.layout.x")
    except ConfigError as error:
        assert error.path == "model.layout.x" and error.remedy
        return
    assert len(names) == n_layers and all(isinstance(name, str) for name in names)


@FUZZ
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60) | st.text("{}[]&*!|>-: \n'\"ab1,#%@", max_size=60))
@example("a: &a [*a]")
@example("? !!python/name:os.system\n: 1")
def test_any_text_is_refused_or_read(text: str) -> None:
    try:
        check(text)
    except ConfigError as error:
        assert error.path.startswith("model") and error.remedy


def mutated(value: Any, draw: random.Random) -> Any:
    """A composition with one thing changed: a value, a key, something gone, something twice."""
    if isinstance(value, dict) and value:
        key = draw.choice(list(value))
        how = draw.choice(["into", "into", "into", "odd", "drop", "rename", "add"])
        if how == "into":
            return {**value, key: mutated(value[key], draw)}
        kept = {k: v for k, v in value.items() if k != key}
        if how == "odd":
            return {**value, key: draw.choice(ODD)}
        if how == "rename":
            return {**kept, f"{key}x": value[key]}
        return (
            {**value, draw.choice(["name", "top_k", "d_ff"]): draw.choice([1, "mla", None])} if how == "add" else kept
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return draw.choice([value + 1, value - 1, -value, value * 2**40, 0, str(value), float(value)])
    return draw.choice(ODD)


PRESETS = presets.names()


@pytest.mark.parametrize("name", [n if n in PRESETS[::5] else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS])
def test_any_change_to_a_preset_composes_or_is_refused(name: str) -> None:
    draw, small = random.Random(name if not EXAMPLES else None), {"vocab_size": 256}
    composed = check(preset(name, small | ({"images": {"image_token": 255}} if "images" in preset(name) else {})))
    for _ in range(max(4, EXAMPLES // 500)):
        model = mutated(composed, draw)
        text_or_tree = yaml.safe_dump(model) if draw.random() < 0.2 else model

        def composed_or_refused(text_or_tree: Any = text_or_tree) -> None:
            try:
                check(text_or_tree)
            except ConfigError as error:
                assert error.path and error.remedy

        assert takes_less(2, composed_or_refused)


@pytest.mark.slow
def test_every_yaml_of_conf_survives_damage(tmp_path: Path) -> None:
    draw = random.Random(0)
    for file in sorted(presets.BUILTIN.glob("*.yaml")):
        text = file.read_text()
        for damaged in (
            text[: draw.randrange(1, len(text))],
            text.replace(draw.choice(text), draw.choice("{}[]:&*!")),
            text * 2,
        ):
            try:
                check(damaged)
            except ConfigError as error:
                assert error.path.startswith("model") and error.remedy
