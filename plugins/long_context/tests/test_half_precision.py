"""Half precision: strings to recall, and the callbacks, next to fp32."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.training import test_half_precision as half
from tests.training.test_half_precision import Run, assert_rounded, assert_same_bits

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("half_precision_of_context")]  # runs that are compared
run, watch = half.run, half.watch


@pytest.fixture(scope="module")
def cases() -> half.Cases:
    recall = ["data/transforms=recall", "data.transforms.recall.every=16", "data.transforms.recall.length=3"]
    callbacks = ["callbacks=[default,long_context,extrapolation]", "callbacks.long_context.samples=1"]
    return {"causal_lm": [*half.TEXT, *recall, *callbacks, "callbacks.extrapolation.multiples=[2]"]}


def test_default_dtype_changes_no_bit_of_a_run(run: Callable[[str, str], Run]) -> None:
    assert_same_bits(run("causal_lm", "fp32"), run("causal_lm", "default dtype"))


def test_figures_are_those_of_the_same_rounded_weights(run: Callable[[str, str], Run]) -> None:
    assert_rounded(run("causal_lm", "fp32"), run("causal_lm", "bf16-true"))
