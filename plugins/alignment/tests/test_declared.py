"""Every figure that a task logs is declared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab import test_figures as figures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("figures")]
trained = figures.trained
SORTING = ["data.tokenizer.vocab_size=16", "data.corpus.train=8", "data.corpus.held_out=2"]
PAIRS = ["data=sorting_preferences", *SORTING]
OF_TASK = {  # what a task trains on
    "grpo": ["data=sorting_prompts", *SORTING, "task.group_size=2", "task.max_new_tokens=4", "task/penalty=k3",
             "task/correction=truncate", "task.reference=START", "task/surrogate=clip"],
    "preference": [*PAIRS, "task/preference=orpo"],
    "reward": PAIRS,
    "distill": ["init_from=START"],
}  # fmt: skip


@pytest.mark.parametrize("task", OF_TASK)
def test_every_figure_that_a_task_logs_is_declared(task: str, trained: Callable[..., Path]) -> None:
    trained("causal_lm", ["test=true"])  # START
    assert figures.undeclared(trained(task, [f"task={task}", *OF_TASK[task]])) == set()
