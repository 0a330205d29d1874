"""Matched arms: what is counted, where a knob is found, that an arm is as near as it can be, and what is refused."""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.blocks.forward_pass import Pass
from blockwright.lab.match import __main__ as command
from blockwright.lab.match import knobs, request
from blockwright.lab.match.__main__ import main
from blockwright.lab.match.knobs import UnmovedError, nearest
from blockwright.lab.match.sizing import (
    BUDGETS,
    Match,
    _sized,
    measure,
    measure_one,
    override,
    read_arm,
    residuals,
    size,
)
from blockwright.lab.match.table import arms_table
from blockwright.registry import REFUSED, ConfigError, register
from blockwright.registry.command import run_command
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of

pytestmark = pytest.mark.xdist_group("match")  # its models are composed once

ATTENTIONS = ("mha", "gqa", "mqa", "mla")


@functools.cache
def arm_of(name, overrides, context=None):
    """To compose takes longer than to match."""
    return read_arm(name, overrides, context)


def matched(base, match, names=ATTENTIONS, **more):
    arms = [arm_of(name, (*base, f"model/attention={name}")) for name in names]
    return {sized.arm.name: sized for sized in size(arms, names[0], match, **more)}


@pytest.mark.slow
def test_figures_are_those_of_the_whole_model_run_at_once():
    decoder = compose(compose_config(["model=tiny"]).model, device="meta")
    figures = measure(decoder.config, 48)
    assert figures.params == sum(p.numel() for p in decoder.parameters())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(1, 48, dtype=torch.long, device="meta"))
    assert figures.flops == 3 * counter.get_total_flops() / 48
    assert figures.flops < measure({**decoder.config, "mtp": {"depth": 1}}, 48).flops
    assert figures.cache_bytes == sum(cache.nbytes for cache in decoder.new_caches(1, 48)) / 48


def test_residual_is_the_share_by_which_a_figure_exceeds_the_goal(tiny):
    model = check(tiny(moe=True))
    assert {budget: measure_one(model, budget, 32) for budget in BUDGETS} == asdict(measure(model, 32))
    figures = measure(check(tiny()), 32)
    goal = {"params": figures.params * 2, "flops": figures.flops, "active_params": None}
    found = residuals(figures, goal)
    assert found == {"params": -0.5, "flops": 0.0, "active_params": None, "cache_bytes": None}


@functools.cache
def model_of(*overrides):
    return check(composition_of(registry.to_plain(compose_config(overrides).model)))


def where(model, name):
    return {place.path: place.value for place in knobs.find(model, name).places}


def test_knobs_stand_where_presets_variants_and_overrides_have_them(tiny):
    model = model_of("model=tiny")
    assert where(model, "d_ff") == {"model.ffn.shared.d_ff": 128, "model.variants.ffn.dense.d_ff": 512}
    assert where(model, "d_expert") == {"model.experts.d_ff": 64, "model.ffn.shared.d_ff": 128}
    assert where(model, "n_experts") == {"model.ffn.n_experts": 16}
    assert where(model, "d_model") == {"model.d_model": 192} and where(model, "n_layers") == {"model.n_layers": 4}
    assert where(model, "model.gating.top_k") == {"model.gating.top_k": 4}
    assert knobs.knobs_of(model) == list(knobs.KNOBS)
    model = model_of("model=llama2_7b")  # dense
    assert where(model, "d_ff") == {"model.ffn.d_ff": 11008} and knobs.knobs_of(model) == [
        "d_ff",
        "d_model",
        "n_layers",
    ]
    wide = {"variants": {"ffn": {"wide": {"d_ff": 80}}}, "layout": {"ffn": "ffn*1 wide*1"}, "n_layers": 3}
    model = check(tiny(**{**wide, "layout": {"ffn": "ffn*2 wide*1"}}, overrides=[{"layers": 0, "ffn": {"d_ff": 56}}]))
    places = {"model.ffn.d_ff": 40, "model.variants.ffn.wide.d_ff": 80, "model.overrides.0.ffn.d_ff": 56}
    assert where(model, "d_ff") == places
    experts = {"ffn": {"name": "moe", "n_experts": 6, "experts": {"name": "swiglu", "d_ff": 12}}}
    inline = check(tiny(**experts, gating={"name": "softmax_topk"}))
    assert where(inline, "d_expert") == {"model.ffn.experts.d_ff": 12}
    model = model_of("model=tiny")
    d_ff, d_expert = knobs.find(model, "d_ff"), knobs.find(model, "d_expert")
    assert list(d_ff.at(192).values()) == [192, 576] and list(d_ff.at(100).values()) == [100, 484]
    assert list(d_expert.at(96).values()) == [96, 192] and list(d_expert.at(65).values()) == [65, 130]


@pytest.mark.slow
def test_a_width_that_a_block_chooses_itself_is_told(tiny):
    for kind in ("swiglu", "gelu"):
        model = check(tiny(ffn=kind, n_layers=1, d_model=100, attention={"name": "gqa", "n_heads": 2}))
        (place,) = knobs.find(model, "d_ff").places
        explicit = knobs.changed(model, {place.keys: place.value})
        assert measure(explicit, 8) == measure(model, 8)
        assert measure(knobs.changed(model, {place.keys: place.value + 1}), 8).params > measure(model, 8).params


@pytest.mark.slow
def test_layers_behind_deepseek_v2s_comparison_are_found():
    names = ("of/deepseek_7b", "of/ablation_7b_gqa", "of/ablation_7b_mqa")
    targets = dict(zip(names, (6.9e9, 6.9e9, 7.1e9), strict=True))
    base = ["model=deepseek_7b", "model.n_layers=20"]
    sizes = matched(base, Match("params", "n_layers", 0.01), names, targets=targets)
    assert [sized.changed for sized in sizes.values()] == [{"model.n_layers": (20, n)} for n in (30, 34, 37)]
    presets = [model_of(f"model=ablation_7b_{name}") for name in ("mha", "gqa", "mqa")]
    assert [sized.figures.params for sized in sizes.values()] == [measure(m, 16).params for m in presets]
    assert sizes[names[1]].residual["params"] == sizes[names[1]].figures.params / sizes[names[0]].figures.params - 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budget", "by"), [("active_params", "d_model"), ("params", "n_experts"), ("flops", "d_expert")]
)
def test_no_other_value_of_the_multiple_is_nearer(tiny, budget, by):
    base = ["model=tiny", "model.d_model=64", "model.n_layers=3", "model.attention.n_heads=2"]
    arms = [read_arm("small", base), read_arm("other", [*base, "model/attention=mqa", "model.attention.n_heads=2"])]
    goal = 1.6 * getattr(measure(arms[0].model, 256), budget)
    sized = size(arms, "small", Match(budget, by, 0.15 if by == "n_layers" else 0.06), {"other": goal})[1]
    assert sized.multiple is not None
    knob = knobs.find(arms[1].model, by)
    reached = abs(getattr(sized.figures, budget) - goal)
    tried = 0
    for value in range(sized.multiple, 4 * knob.value, sized.multiple):
        try:
            figure = measure_one(knobs.changed(arms[1].model, knob.at(value)), budget, 256)
        except ConfigError:
            continue
        tried += 1
        assert figure is not None and reached <= abs(figure - goal)
    assert tried >= 3


@pytest.mark.slow
def test_unknown_block_of_a_plug_in_is_matched(temporary_blocks):
    from torch import Tensor, nn

    from blockwright.blocks.ffn import FFN

    @register("ffn", "doubled")
    class Doubled(FFN):
        """A plug-in's feed-forward block.

        Args:
            d_ff: width
        """

        def __init__(self, d_model: int, d_ff: int = 100) -> None:
            super().__init__()
            self.up, self.again = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_ff)
            self.down = nn.Linear(d_ff, d_model)

        def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
            return self.down(self.again(self.up(x))), None

    base = ["model=gpt2", "model.n_layers=1"]
    arms = [read_arm("theirs", base), read_arm("plug-in", [*base, "model/ffn=doubled"])]
    sized = size(arms, "theirs", Match("active_params", "d_ff", 0.001))[1]
    assert sized.residual["active_params"] is not None and abs(sized.residual["active_params"]) <= 0.001
    assert list(sized.changed) == ["model.ffn.d_ff"]


@pytest.fixture
def composed_once(monkeypatch):
    monkeypatch.setattr(command, "read_arm", lambda name, overrides, context: arm_of(name, tuple(overrides), context))


def answer(capsys, *words):
    code = run_command(main, words)
    said = capsys.readouterr()
    return code, said.out, said.err


# words → where the message begins
@pytest.mark.slow
def test_cache_of_a_plug_in_without_one_cannot_be_matched(temporary_blocks, capsys):
    from blockwright.blocks.attention.grouped import GQA

    @register("attention", "forgetful")
    class Forgetful(GQA):
        """A plug-in without a cache."""

        def new_cache(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    words = ["model.n_layers=1", "model/attention=mha,forgetful", "match=cache_bytes", "by=d_model"]
    code, _, err = answer(capsys, *words)
    assert code == REFUSED and "arm forgetful: match = cache_bytes" in err


def test_budget_of_which_the_baseline_has_none_is_refused():
    arms = [arm_of(name, ("model=tiny", f"model/attention={name}")) for name in ("mha", "mqa")]
    none = measure(arms[0].model, 8).__class__(1, 1, 1.0, 0)
    goal = asdict(none)
    with pytest.raises(ConfigError, match="the baseline has none of it"):
        _sized(arms[1], Match("cache_bytes", "d_model"), goal, None)


@pytest.mark.parametrize(
    ("budget", "names"), [("params", "mha mqa"), pytest.param("flops", "mha gqa mqa mla", marks=pytest.mark.slow)]
)
def test_attentions_are_matched(budget, names):
    sizes = matched(["model=tiny", "model.n_layers=2"], Match(budget, "d_ff", 0.01), tuple(names.split()))
    goal = getattr(sizes["mha"].figures, budget)
    assert not sizes["mha"].changed and sizes["mha"].match is None
    for sized in sizes.values():
        figure = getattr(measure(model_of(*sized.overrides), sized.arm.context), budget)  # what train.py would build
        assert figure == getattr(sized.figures, budget)
        assert abs(figure / goal - 1) <= 0.01
        assert sized.residual[budget] == figure / goal - 1
    assert sizes["mqa"].changed
    alone = replace(sizes["mqa"], arm=replace(sizes["mqa"].arm, name="alone"), match=None)
    for more, told in (([], False), ([alone], True)):
        assert ("alone by nothing" in str(arms_table([*sizes.values(), *more], "mha", 8).caption)) == told


@pytest.mark.slow
def test_arms_near_enough_are_left_alone_and_a_baseline_moves_to_its_own_target():
    sizes = matched(["model=tiny"], Match("params", "d_ff", 0.005), ("mha", "mla"))
    assert sizes["mla"].changed == {} and 0 < (sizes["mla"].residual["params"] or 0) < 0.005
    sizes = matched(["model=tiny"], Match("params", "d_ff"), ("mha", "mqa"), targets={"mha": 4e6})
    assert sizes["mha"].changed and sizes["mha"].match and abs(sizes["mha"].figures.params / 4e6 - 1) <= 0.005
    assert abs(sizes["mqa"].figures.params / sizes["mha"].figures.params - 1) <= 0.005


NODES = {  # a further ffn, or the ffn of one layer → where its width is, and the override that changes it to 192
    "+model.variants.ffn.other={name:swiglu}": ("other", "++model.variants.ffn.other.d_ff=192"),
    "+model.variants.ffn.other=swiglu": ("other", "++model.variants.ffn.other={name:swiglu,d_ff:192}"),
    "model.overrides=[{layers:0,ffn:{name:swiglu,d_ff:64}}]": ("overrides", "model.overrides.0.ffn.d_ff=192"),
}


@pytest.mark.parametrize("node", NODES)
def test_a_change_is_an_override_that_does_it(node):
    part, written = NODES[node]
    config = ["model=tiny", node, *(["model.layout.ffn='dense*1 other*1 ffn*'"] if part == "other" else [])]
    arm = read_arm("a", config)
    (place,) = [p for p in knobs.find(arm.model, "d_ff").places if part in p.path]
    line = override(arm.written, place, 192)
    assert line == written
    assert model_of(*config, line) == check(knobs.changed(arm.model, {place.keys: 192}))


def test_arms_are_what_a_sweep_would_run():
    arms = request.swept(["seed=1", "model/attention=glob(m?*a,exclude=mo*)", "model.n_layers=2,3"])
    assert list(arms) == ["mha+2", "mha+3", "mla+2", "mla+3", "mqa+2", "mqa+3"]
    assert arms["mla+3"] == ["seed=1", "model/attention=mla", "model.n_layers=3"]
    assert list(request.swept(["model.layout.ffn=[dense,ffn],[ffn,dense]"])) == ["[dense,ffn]", "[ffn,dense]"]


@pytest.mark.slow
def test_table_and_json_say_what_changed_and_how_far_off_every_budget_is(capsys, composed_once):
    words = ("model=tiny", "model/attention=mha,mqa", "match=params", "by=d_ff")
    code, out, _ = answer(capsys, *words)
    assert code == 0 and "model.ffn.shared.d_ff 128 → 240" in out and "−87.50 %" in out
    assert "mqa: model=tiny model/attention=mqa model.ffn.shared.d_ff=240 model.variants.ffn.dense.d_ff=624" in out
    code, out, _ = answer(capsys, *words, "baseline=mqa", "--json")
    arms = {arm["name"]: arm for arm in json.loads(out)["arms"]}
    assert code == 0 and arms["mqa"]["baseline"] and arms["mqa"]["match"] is None
    match, figures = arms["mha"]["match"], arms["mha"]["figures"]
    assert match["residual"]["params"] == figures["params"] / arms["mqa"]["figures"]["params"] - 1
    assert match["changed"]["model.ffn.shared.d_ff"][0] == 128 and set(match["residual"]) == set(BUDGETS)


MISTAKES = {  # words → where the message begins
    "match=parms by=d_ff": "match = parms",
    "match=params by=dff": "by = dff",
    "by=d_ff": "match = null",
    "match=params by=d_ff tol=tight": "tol = tight",
    "match=params by=d_ff baseline=mla": "baseline = mla",
    "match=params by=d_ff target=1e6,2e6,3e6": "target = ",
    "match=flops by=d_ff context=0": "context = 0",
    "--jsn": "command line = --jsn",
    "model/ffn=swiglu match=params by=n_experts": "arm mqa: by = n_experts",  # which it lacks
    "match=cache_bytes by=d_ff": "arm mqa: by = d_ff",  # which moves nothing
    "model.n_layers=2,2": "command line = mha+2",  # two arms of one name
    "model.experts.d_ff=${model.ffn.shared.d_ff} match=params by=d_ff": "arm mqa: by = d_ff",  # which follows it
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_one_message(capsys, composed_once, mistake):
    code, out, err = answer(capsys, "model/attention=mha,mqa", *mistake.split())
    assert code == REFUSED and out == ""
    assert err.startswith(f"error: {MISTAKES[mistake]}") and len(err.splitlines()) == 3


@pytest.mark.slow
def test_refusal_names_a_tolerance_that_does_and_none_that_would_be_refused(capsys, composed_once):
    words = ["model/attention=mha,mqa", "match=params", "by=n_layers"]
    _, _, err = answer(capsys, *words)
    tol = err.partition("Write tol=")[2].partition(".  ")[0].split()[0].rstrip(".")
    assert answer(capsys, *words, f"tol={tol}")[0] == 0
    assert "Write tol=" not in answer(capsys, "model=tiny", *words[:2], "by=d_ff", "target=1e15")[2]


WIDTHS = (64, 32, 16, 8, 4, 2, 1)
TOP = 3000  # numbers above are not tried by the brute force, and goals lie below what is measured there


def brute_force(figures, goal, multiples, tol):
    """The coarsest multiple that reaches the goal, else the finest; and how far off the nearest of its numbers is."""
    for multiple in multiples:
        off = min((abs(f - goal) for v, f in figures.items() if v % multiple == 0), default=math.inf)
        if off <= tol * goal:
            break
    return multiple, off


@example(power=1.0, slope=1.0, floor=0.0, start=641, wanted=642.0, tol=0.0, multiples=(64, 16))
@example(power=1.0, slope=1.0, floor=0.0, start=639, wanted=638.0, tol=0.0, multiples=(64, 16))
@settings(max_examples=80, deadline=None)
@given(
    power=st.sampled_from([0.5, 1.0, 1.3, 2.0, 3.0]),
    slope=st.floats(0.01, 1e6),
    floor=st.floats(0, 1e9),
    start=st.integers(1, 2000),
    wanted=st.floats(0.3, 2500.0),
    tol=st.sampled_from([0.0, 1e-4, 0.005, 0.1]),
    multiples=st.sampled_from([WIDTHS, (8, 4, 2, 1), (1,), (64, 16)]),
)
def test_search_finds_what_trying_every_number_finds(power, slope, floor, start, wanted, tol, multiples):
    def figure(value):
        return floor + slope * value**power

    goal = figure(wanted)
    found = nearest(figure, start, figure(start), goal, multiples, tol)
    multiple, off = brute_force({v: figure(v) for v in range(1, TOP)}, goal, multiples, tol)
    assert found.multiple == multiple
    assert found.value % multiple == 0 and abs(found.figure - goal) == pytest.approx(off, rel=1e-9, abs=1e-9 * goal)
    assert found.figure == figure(found.value)


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(st.floats(0.1, 100), min_size=100, max_size=100), start=st.integers(1, 99), share=st.floats(0, 1))
def test_any_growth_is_followed(steps, start, share):
    sums = [*itertools.accumulate(steps)]
    goal = sums[0] + share * (sums[-1] - sums[0])
    found = nearest(lambda v: sums[v - 1] if v <= len(sums) else None, start, sums[start - 1], goal, (1,), 0.0)
    assert abs(found.figure - goal) == min(abs(s - goal) for s in sums)


@settings(max_examples=40, deadline=None)
@given(start=st.integers(1, 60), wanted=st.integers(20, 2000), heads=st.sampled_from([6, 10, 14, 20, 48]))
def test_numbers_that_cannot_be_built_are_passed_over(start, wanted, heads):

    def figure(value):
        return float(value * value) if value % heads == 0 else None

    found = nearest(figure, start * heads, float(start * heads) ** 2, float(wanted * wanted), WIDTHS, 0.0)
    buildable = list(range(heads, TOP, heads))
    assert abs(found.figure - wanted**2) == min(abs(v * v - wanted**2) for v in buildable)


def test_search_takes_few_measurements():
    tried = []

    def figure(value):
        tried.append(value)
        return 7e9 + 3 * 2048 * 27 * value

    found = nearest(figure, 10944, 7e9 + 3 * 2048 * 27 * 10944, 7e9 + 3 * 2048 * 27 * 5000, WIDTHS, 0.005)
    assert found.value == 4992 and found.multiple == 64
    assert len(tried) == found.measured == len(set(tried)) <= 4


def test_limits_and_coarse_multiples_of_a_search():
    for tol, value in ((0.05, 768), (0.011, 768), (0.008, 784), (0.002, 776), (0.0, 777)):
        assert nearest(lambda v: 100.0 + v, 500, 600.0, 100.0 + 777, WIDTHS, tol).value == value
    found = nearest(lambda v: float(v) if v <= 100_003 else None, 64, 64.0, 1e9, WIDTHS, 0.001)
    assert found.value == 100_003  # nothing larger can be built
    tried = []
    found = nearest(lambda value: tried.append(value) or float(value), 4, 4.0, 1e9, (1,), 0.001, largest=1000)
    assert found.value == 1000 == max(tried)
    assert nearest(lambda v: 1000.0 * v, 640, 640_000.0, 1_234_567.0, WIDTHS, 0.0).measured <= 6 + 2 * len(WIDTHS)
    for goal in (1.0, 50.0):
        with pytest.raises(UnmovedError):
            nearest(lambda value: 7.0, 512, 7.0, goal, WIDTHS, 0.001)
