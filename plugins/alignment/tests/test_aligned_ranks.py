"""Post-training on two ranks: the texts, the reference, the steps and the figures of one process; resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
from aligned import pairs, prompts, trainer
from many_ranks import DENSE, MOE, Descent, read_model, spawn

from blockwright.plugins.alignment.rollouts.engine.native import Native
from blockwright.plugins.alignment.rollouts.group_sampler import GroupSampler
from blockwright.training.parallel.local import whole
from blockwright.training.parallel.strategy import Parallel
from blockwright.training.schedulers import Constant
from tests import built

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("aligned_ranks")]  # its fixtures train on two ranks, once

SPLIT = MOE.replace(", balance: [{name: hf_expert, alpha: 0.02}, {name: z_loss}]", "")  # losses of padding differ
GRPO: dict[str, Any] = {"reward": {"name": "length", "longest": 8, "buffer": 7}, "advantage": "batch", "group_size": 4}
GRPO |= {"max_new_tokens": 6, "resamples": 2}
FIGURES = (
    "train/reward",
    "train/replaced",
    "train/margin",
    "val/loss",
    "val/accuracy",
    "val/chosen",
    "val/rejected",
    "val/reward",
)


class Texts(L.Callback):
    """What each step of policy optimisation was made of on this rank."""

    def __init__(self) -> None:
        self.texts: list[list[tuple[int, ...]]] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        newest = task.rollouts.whole[max(task.rollouts.whole)]
        self.texts.append(sorted((*p, -1, *c) for p, c in zip(newest.prompts, newest.completions, strict=True)))


def fit(folder: Path, task: Any, data: Any, steps: int, ckpt_path: Path | None, **how: Any) -> dict[str, Any]:
    by = trainer(folder, steps, **how)
    by.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    if ckpt_path is None and getattr(data, "updates", 2) > 1:
        by.save_checkpoint(folder / "stop.ckpt")
    found = {name: float(by.callback_metrics[name]) for name in ("train/loss", *FIGURES) if name in by.callback_metrics}
    return {"figures": found, "weights": {k: whole(v.detach()).clone() for k, v in task.model.named_parameters()}}


def grpo(folder: Path, steps: int, ckpt_path: Path | None = None, model: str = DENSE, **how: Any) -> dict[str, Any]:
    task = built.task("grpo", read_model(model), Descent(), Constant(warmup=1), **GRPO, replay=model is SPLIT)
    watch, data = Texts(), prompts(folder, how.pop("updates", 1), train=24)
    return {**fit(folder, task, data, steps, ckpt_path, callbacks=[watch], **how), "texts": watch.texts}


def preference(
    folder: Path, steps: int, start: Path | None, ckpt_path: Path | None = None, model: str = DENSE, **how: Any
) -> dict[str, Any]:
    given = {"preference": "simpo" if start is None else "sigmoid"}
    given |= {"init_from": str(start)} if start and not ckpt_path else {}
    task = built.task("preference", read_model(model), Descent(), Constant(warmup=1), **given)
    found = fit(folder, task, pairs(folder, train=24, held_out=5), steps, ckpt_path, **how)
    return {**found, "logs": task._logs}


def close(ranks: Any, expected: dict[str, Any]) -> None:
    """The figures and the weights of ranks are those of one process."""
    for rank in ranks:
        assert rank["figures"] == pytest.approx(expected["figures"], abs=1e-5)
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=1e-4, msg=name)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one["weights"][name], weight) for name, weight in other["weights"].items())


class Gathers(Native):
    """Counts how often a rollout gathers weights."""

    counts: ClassVar[list[int]] = []

    def sample(self, decoder: Any, request: Any) -> Any:
        with patch.object(groups, "foreach_all_gather", wraps=groups.foreach_all_gather) as gather:
            found = super().sample(decoder, request)
        self.counts.append(gather.call_count)
        return found


def grpo_on_ranks(folder: Path) -> dict[str, Any]:
    with patch.object(GroupSampler, "engine", property(lambda _: Gathers(), lambda *_: None), create=True):
        found: dict[str, Any] = {"fsdp": grpo(folder / "fsdp", 3, strategy=Parallel(), devices=2)}
    found |= {"gathers": Gathers.counts, "ddp": grpo(folder / "ddp", 3, strategy="ddp", devices=2)}
    found["fsdp_ep"] = grpo(folder / "fsdp_ep", 3, model=SPLIT, strategy=Parallel(expert=2), devices=2)
    how: dict[str, Any] = {"model": MOE, "updates": 2, "strategy": "ddp", "devices": 2}
    found["whole"] = grpo(folder / "whole", 4, **how)
    grpo(folder / "part", 3, **how)
    found["rest"] = grpo(folder / "part", 4, folder / "part" / "stop.ckpt", **how)
    how["model"] = DENSE
    found["of one"] = grpo(folder / "alone", 4, folder / "alone" / "stop.ckpt", **how)
    found["of two"] = grpo(folder / "both", 4, **how)
    grpo(folder / "pair", 3, **how)
    return found


def alone(folder: Path) -> dict[str, Any]:
    return grpo(folder / "alone", 3, updates=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    spawn(1, alone, folder)
    two = spawn(2, grpo_on_ranks, folder)  # first: threads of a training do not survive the fork
    one, split = grpo(folder / "one", 3), grpo(folder / "split", 3, model=SPLIT)
    return {"ddp": one, "fsdp": one, "fsdp_ep": split, "two": two, "pair": folder / "pair" / "stop.ckpt"}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_ep"])
def test_two_ranks_sample_the_texts_of_one_and_take_its_steps(runs: Any, strategy: str) -> None:
    one, two = runs[strategy], [rank[strategy] for rank in runs["two"]]
    for step, expected in enumerate(one["texts"]):
        assert sorted(two[0]["texts"][step] + two[1]["texts"][step]) == expected
    assert all(rank["figures"]["train/replaced"] > 0 or strategy == "fsdp_ep" for rank in two)
    close(two, one)


def test_rollout_gathers_each_weight_once(runs: Any) -> None:
    """Six tokens per completion, two layers, and what surrounds them; some of it may be gathered already."""
    for rank in runs["two"]:
        assert len(rank["gathers"]) > 3 and all(0 < n <= 3 for n in rank["gathers"])


def test_ranks_resume_between_the_updates_of_a_rollout(runs: Any, tmp_path: Path) -> None:
    """The update that is left is of the completions that it was to be of, however many ranks share them."""
    for rank in runs["two"]:
        assert rank["rest"]["texts"] == rank["whole"]["texts"][3:] and same(rank["rest"], rank["whole"])
    for uninterrupted, rest in (
        ([grpo(tmp_path / "whole", 4, updates=2)], [rank["of one"] for rank in runs["two"]]),
        ([rank["of two"] for rank in runs["two"]], [grpo(tmp_path, 4, runs["pair"], updates=2)]),
    ):
        expected = sorted(text for rank in uninterrupted for text in rank["texts"][3])
        assert sorted(text for rank in rest for text in rank["texts"][0]) == expected
        close(rest[:1], uninterrupted[0])


def preference_on_ranks(folder: Path) -> dict[str, Any]:
    start, two = folder / "dense" / "stop.ckpt", {"devices": 2}
    found = {"ddp": preference(folder / "ddp", 3, start, strategy="ddp", **two)}
    found["fsdp"] = preference(folder / "fsdp", 3, start, strategy=Parallel(), **two)
    start, how = folder / "moe" / "stop.ckpt", {"model": MOE, "strategy": "ddp", **two}
    found["whole"] = preference(folder / "whole", 3, start, **how)
    preference(folder / "part", 2, start, **how)
    return {**found, "rest": preference(folder / "part", 3, start, folder / "part" / "stop.ckpt", **how)}


def _starts(folder: Path) -> None:
    for name, model in (("dense", DENSE), ("moe", MOE)):
        preference(folder / name, 1, None, model=model)


def test_two_ranks_optimise_preferences_and_resume_as_one(tmp_path: Path) -> None:
    spawn(1, _starts, tmp_path)  # threads of a training do not survive the fork that follows
    two = spawn(2, preference_on_ranks, tmp_path)
    one = preference(tmp_path / "one", 3, tmp_path / "dense" / "stop.ckpt")
    for strategy in ("ddp", "fsdp"):
        for rank in (each[strategy] for each in two):
            for split, logs in one["logs"].items():
                torch.testing.assert_close(rank["logs"][split], logs, atol=1e-4, rtol=0)
        close([each[strategy] for each in two], one)
    assert all(same(rank["rest"], rank["whole"]) for rank in two)
