"""Policy optimisation on two ranks: the texts, the steps and the figures of one process; resuming between updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import lightning as L
import pytest
import torch
import torch.distributed.fsdp._fully_shard._fsdp_param_group as groups
from many_ranks import DENSE, MOE, Descent, read_model, spawn

from blockwright.plugins.alignment.rollouts.engine.native import Native
from blockwright.plugins.alignment.rollouts.group_sampler import GroupSampler
from blockwright.training.data.sorting import Sorting
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.parallel.local import whole
from blockwright.training.parallel.strategy import Parallel
from blockwright.training.schedulers.constant import Constant
from tests import built

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("grpo_ranks")]  # its fixture trains on two ranks, once

SPLIT = MOE.replace(", balance: [{name: hf_expert, alpha: 0.02}, {name: z_loss}]", "")  # losses of padding differ
STRATEGIES = ("ddp", "fsdp", "fsdp_ep")


class Texts(L.Callback):
    """What each step was made of on this rank, and the weights after the last."""

    def __init__(self) -> None:
        self.texts: list[list[tuple[int, ...]]] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        newest = task.rollouts.whole[max(task.rollouts.whole)]
        self.texts.append(sorted((*p, -1, *c) for p, c in zip(newest.prompts, newest.completions, strict=True)))


def train(folder: Path, steps: int, ckpt_path: Path | None = None, model: str = DENSE, **how: Any) -> dict[str, Any]:
    task = built.task(
        "grpo",
        read_model(model),
        Descent(),
        Constant(warmup=1),
        reward={"name": "length", "longest": 8, "buffer": 7},
        advantage="batch",
        group_size=4,
        max_new_tokens=6,
        resamples=2,
        replay=model is SPLIT,
    )
    data = built.data(
        "prompts",
        corpus=Sorting(train=24, held_out=4, salt=1),
        tokenizer=Chars(16),
        sequence_length=12,
        batch_size=4,
        updates=how.pop("updates", 1),
        cache_dir=str(folder / "cache"),
    )
    watch = Texts()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        check_val_every_n_epoch=None,
        val_check_interval=steps,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[watch],
        default_root_dir=folder,
        **how,
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    if data.updates > 1 and ckpt_path is None:
        trainer.save_checkpoint(folder / "stop.ckpt")
    names = ("train/reward", "train/loss", "train/replaced", "val/reward")
    figures = {name: float(trainer.callback_metrics[name]) for name in names}
    weights = {k: whole(v.detach()).clone() for k, v in task.model.named_parameters()}
    return {"texts": watch.texts, "figures": figures, "weights": weights}


class Gathers(Native):
    """Counts how often a rollout gathers weights."""

    counts: ClassVar[list[int]] = []

    def sample(self, decoder: Any, request: Any) -> Any:
        with patch.object(groups, "foreach_all_gather", wraps=groups.foreach_all_gather) as gather:
            found = super().sample(decoder, request)
        self.counts.append(gather.call_count)
        return found


def on_ranks(folder: Path) -> dict[str, Any]:
    with patch.object(GroupSampler, "engine", property(lambda _: Gathers(), lambda *_: None), create=True):
        train(folder / "gathers", 2, strategy=Parallel(), devices=2)
    found: dict[str, Any] = {
        "gathers": Gathers.counts,
        "ddp": train(folder / "ddp", 3, strategy="ddp", devices=2),
        "fsdp": train(folder / "fsdp", 3, strategy=Parallel(), devices=2),
        "fsdp_ep": train(folder / "fsdp_ep", 3, model=SPLIT, strategy=Parallel(expert=2), devices=2),
    }
    how: dict[str, Any] = {"model": MOE, "updates": 2, "strategy": "ddp", "devices": 2}
    uninterrupted = train(folder / "whole", 4, **how)
    train(folder / "part", 3, **how)
    rest = train(folder / "part", 4, folder / "part" / "stop.ckpt", **how)
    how["model"] = DENSE
    of_one = train(folder / "alone", 4, folder / "alone" / "stop.ckpt", **how)
    of_two = train(folder / "both", 4, **how)
    train(folder / "pair", 3, **how)
    return {**found, "whole": uninterrupted, "rest": rest, "of one": of_one, "of two": of_two}


def alone(folder: Path) -> dict[str, Any]:
    return train(folder / "alone", 3, updates=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("runs")
    spawn(1, alone, folder)
    two = spawn(2, on_ranks, folder)  # first: threads of a training do not survive the fork
    split = train(folder / "split", 3, model=SPLIT)
    return {
        "ddp": (one := train(folder / "one", 3)),
        "fsdp": one,
        "fsdp_ep": split,
        "two": two,
        "pair": folder / "pair" / "stop.ckpt",
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_sample_the_texts_of_one_and_take_its_steps(runs: Any, strategy: str) -> None:
    one, two = runs[strategy], [rank[strategy] for rank in runs["two"]]
    for step, expected in enumerate(one["texts"]):
        assert sorted(two[0]["texts"][step] + two[1]["texts"][step]) == expected
    for rank in two:
        assert rank["figures"]["train/replaced"] > 0 or strategy == "fsdp_ep"
        assert rank["figures"] == pytest.approx(one["figures"], abs=1e-5)
        for name, weight in one["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-5, rtol=1e-4, msg=name)


def test_rollout_gathers_each_weight_once(runs: Any) -> None:
    """Six tokens per completion, two layers, and what surrounds them; some of it may be gathered already."""
    for rank in runs["two"]:
        assert len(rank["gathers"]) > 3 and all(0 < n <= 3 for n in rank["gathers"])


def test_two_ranks_resume_between_the_updates_of_a_rollout(runs: Any) -> None:
    for rank in runs["two"]:
        assert rank["rest"]["texts"] == rank["whole"]["texts"][3:]
        assert all(torch.equal(rank["rest"]["weights"][k], v) for k, v in rank["whole"]["weights"].items())


def test_another_number_of_ranks_resumes_between_the_updates_of_a_rollout(runs: Any, tmp_path: Path) -> None:
    """The update that is left is of the completions that it was to be of, however many ranks share them."""
    for uninterrupted, rest in (
        ([train(tmp_path / "whole", 4, updates=2)], [rank["of one"] for rank in runs["two"]]),
        ([rank["of two"] for rank in runs["two"]], [train(tmp_path, 4, runs["pair"], updates=2)]),
    ):
        expected = sorted(text for rank in uninterrupted for text in rank["texts"][3])
        assert sorted(text for rank in rest for text in rank["texts"][0]) == expected
        assert rest[0]["figures"] == pytest.approx(uninterrupted[0]["figures"], abs=1e-5)
        for name, weight in uninterrupted[0]["weights"].items():
            torch.testing.assert_close(rest[0]["weights"][name], weight, atol=1e-5, rtol=1e-4, msg=name)
