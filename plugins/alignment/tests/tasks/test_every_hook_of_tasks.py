"""A checkpoint written at any hook of a task of post-training is of its step: resumed, it is the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest
from aligned import says

from blockwright import registry
from blockwright.plugins.alignment.data.preferences import SortingPreferences
from tests import built
from tests.training.tasks import test_every_hook as hooks
from tests.training.tasks.test_every_hook import Case, Fit

folder, fit, start = hooks.folder, hooks.fit, hooks.start
STAGES = [{"loss": "language", "tokens": 256}, {"loss": "logits", "tokens": 256}, {"loss": "language"}]
GRPO = {"reward": "brief", "group_size": 4, "max_new_tokens": 4}
CASES = {
    "distill": Case({"stages": STAGES}),
    "grpo": Case(GRPO, "prompts", of_data={"sequence_length": 12, "updates": 2}, micro_batches=1),
    "preference": Case({}, "preferences", SortingPreferences, {"sequence_length": 24}),
    "reward": Case({}, "preferences", SortingPreferences, {"sequence_length": 24}),
}


@pytest.fixture(scope="module")
def cases(blocks_of_the_module: None) -> dict[str, Case]:
    registry.register("reward", "brief")(says(lambda text: float(len(text) < 3)))
    return CASES


def test_every_task_is_tried() -> None:
    assert sorted(CASES) == built.names("task", "blockwright.plugins.alignment")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_checkpoint_of_any_hook_is_that_of_its_step(fit: Fit, start: Path, name: str) -> None:
    hooks.assert_step_is_saved(fit, name, CASES[name].micro_batches, start)


@pytest.mark.slow
def test_run_resumes_from_every_hook(fit: Fit, start: Path) -> None:
    hooks.assert_resumes_from_every_hook(fit, "grpo", 1, start)


@pytest.mark.slow
@pytest.mark.parametrize(("hook", "batches"), [("on_train_end", 1), ("on_train_epoch_end", 4)])  # amid a step; after it
def test_run_that_its_time_has_ended_resumes_in_its_stage(fit: Fit, start: Path, hook: str, batches: int) -> None:
    hooks.assert_resumes_after_a_stop(fit, "distill", start, hook, batches)
