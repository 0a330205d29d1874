"""The model against published runs: the fit is the committed one, and runs it has not seen are met."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from blockwright.blocks.compose import compose, preset
from blockwright.plugins.planner.fitting import fitted_text, judgement, main, mean_error, published
from blockwright.plugins.planner.generation import generation
from blockwright.plugins.planner.hardware import COEFFICIENTS, coefficients, hardware
from blockwright.plugins.planner.search import ERROR

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("published_runs")]  # which are measured once
ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_coefficients_are_those_of_the_fit() -> None:
    again, committed = (yaml.safe_load(text) for text in (fitted_text(published()), COEFFICIENTS.read_text()))
    for group in ("coefficients", "speed"):
        assert again[group] == pytest.approx(committed[group], rel=0.01)


def test_held_out_runs_are_met_within_the_error_that_ties_are_judged_by() -> None:
    groups: dict[str, list[float]] = {}
    for row in judgement():
        groups.setdefault(row.used, []).append(row)  # type: ignore[arg-type]
    assert len(groups["held out"]) == 20 and len(groups["fitted"]) == 9
    assert mean_error(groups["held out"]) < ERROR  # type: ignore[arg-type]
    assert mean_error(groups["fitted"]) < 0.07  # type: ignore[arg-type]
    assert mean_error(groups["held out, not Hopper"]) < 0.15  # type: ignore[arg-type]


def test_stages_that_a_source_splits_by_hand_hold_all_layers() -> None:
    split = [run for run in published() if run.layout.stages]
    assert len(split) == 13
    for run in split:
        layers, stages = run.layout.layers_of_stages, run.layout.pipeline * run.layout.interleave
        assert (sum(layers), len(layers)) == (run.measured.n_layers, stages), run.name


def test_the_stage_with_most_work_decides() -> None:
    """The head of GPT-OSS-120B, 201,088 words wide, is as much work as several of its layers."""
    (run,) = (run for run in published() if run.row["model"] == "gpt_oss_120b")
    step = run.predicted(coefficients())
    apart = run.measured.head / (run.measured.training_flops(4096) / 3 - run.measured.head) * 36  # in layers
    assert 4 < apart < 5
    stages = sum(s for name, s in step.parts.items() if name in WITHIN_STAGES)
    assert step.parts["unequal stages"] / stages == pytest.approx((9 + apart) / ((36 + apart) / 4) - 1)


WITHIN_STAGES = (
    *("dense products", "attention scores", "elementwise", "experts' products", "recomputation", "launches"),
    *("tensor parallelism", "context parallelism", "experts' exchange"),
)


def test_deepseek_v2_saves_what_its_paper_says_of_67bs_training() -> None:
    hours = {row.run.row["model"]: 1 / row.predicted for row in judgement() if row.run.row["source"] == "deepseek_v2"}
    assert 1 - hours["deepseek_v2"] / hours["deepseek_67b"] == pytest.approx(0.425, abs=0.01)


def test_deepseek_v2_generates_nearly_as_much_more_than_67b_as_its_paper_says() -> None:
    """5.76 times, over 50 thousand tokens/s, with weights in fp8 and a cache of 6 bits: §3.2.3."""
    device, fitted = hardware("h800"), coefficients()
    ours = generation(compose(preset("deepseek_v2"), device="meta"), device, fitted, weight_bits=8, cache_bits=6)
    other = generation(compose(preset("deepseek_67b"), device="meta"), device, fitted)
    assert ours.tokens_per_second == pytest.approx(50_000, rel=0.1)
    assert ours.tokens_per_second / other.tokens_per_second == pytest.approx(5.76, rel=0.1)
    assert ours.weights == 235_741_434_880 and other.weights == 2 * 67_425_001_472
    assert ours.weights + ours.caches <= 0.9 * 640e9 < ours.weights + ours.caches * (1 + 1 / ours.batch)


def test_the_documented_table_is_what_the_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table"])
    remedy = "run python -m blockwright.plugins.planner.fitting --table, and put it at the end of the page"
    assert capsys.readouterr().out in (ROOT / "plugins" / "planner" / "README.md").read_text(), remedy
