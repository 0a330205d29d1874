"""Preference optimisation and reward models on a model of two layers: the reference's numbers, resuming, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from aligned import AfterBackward, Watch, pairs, trainer

from blockwright import registry
from blockwright.plugins.alignment.tasks.pairs import Preference, answers_of
from blockwright.registry import ConfigError, Node, Scope
from blockwright.training.figure import Figure
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from tests import built

Make = Callable[..., Any]
LOSS = torch.tensor(2.0).log().item()  # of a policy that is its reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(scope="module")
def train(tiny: Make, folder: Path) -> Make:
    def run(
        steps: int, name: str = "preference", ckpt_path: Path | None = None, accumulate: int = 1, **task: Any
    ) -> tuple[Any, Watch, L.Trainer]:
        callbacks = task.pop("callbacks", [])
        model = task.pop("model", None) or tiny(moe=True, vocab_size=16, init={"std": 0.3})
        made = built.task(name, model, AdamW(lr=3e-3, weight_decay=0.0), Constant(warmup=1), **task)
        watch = Watch()
        how = {"accumulate_grad_batches": accumulate, "val_check_interval": steps * accumulate}
        by = trainer(folder, steps, callbacks=[watch, *callbacks], **how)
        by.fit(made, pairs(folder, 8 // accumulate), ckpt_path=ckpt_path, weights_only=True)
        return made, watch, by

    return run


@pytest.fixture(scope="module")
def start(train: Make, folder: Path) -> str:
    """A checkpoint to start from."""
    train(1, preference="simpo")[2].save_checkpoint(folder / "start.ckpt")
    return str(folder / "start.ckpt")


@pytest.fixture(scope="module")
def whole(train: Make, start: str) -> Any:
    """Four steps of DPO, uninterrupted."""
    return train(4, init_from=start)


def test_policy_begins_as_the_reference_and_learns(whole: Any) -> None:
    _, watch, trainer = whole
    first, last, figures = watch.figures[0], watch.figures[-1], trainer.callback_metrics
    assert first["train/loss"] == pytest.approx(LOSS, abs=1e-6) and first["train/margin"] == pytest.approx(0, abs=1e-6)
    assert last["train/loss"] < 0.67 and last["train/margin"] > 0.05 and last["train/chosen"] > last["train/rejected"]
    assert figures["val/margin"] == pytest.approx(figures["val/chosen"] - figures["val/rejected"], abs=1e-6)
    assert 0 <= figures["val/accuracy"] <= 1 and not any(k.startswith("train/bits") for k in figures)


def test_log_probabilities_of_packed_answers_are_those_of_plain_forward_passes(whole: Any) -> None:
    task, _, trainer = whole
    data = trainer.datamodule
    batch = next(iter(data.every("train")))
    with torch.no_grad():
        hidden, _ = task.model.eval().hidden(batch["tokens"], batch["positions"], batch["segments"])
        logp, tokens = answers_of(task.model, hidden, batch)
        found = list(data.corpus.conversations("train"))
        for number, pair in enumerate([found[i] for i in batch["pair"].tolist()]):
            for place, (prompt, answer) in enumerate((pair.messages, pair.rejected)):
                ids = [data.tokenizer.encode(each["content"]).tolist() for each in (prompt, answer)]
                text = torch.tensor([[*ids[0], *ids[1], data.tokenizer.eos]])
                plain = task.model(text)[0, :-1].log_softmax(-1)[range(text.shape[1] - 1), text[0, 1:]]
                at, n = number + place * len(batch["pair"]), len(ids[1]) + 1
                torch.testing.assert_close(logp[at], plain[-n:].sum(), atol=1e-4, rtol=0)
                assert tokens[at] == n


def test_resumed_run_reads_the_reference_and_equals_the_uninterrupted_one(
    train: Make, whole: Any, start: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ``init_from``; no model is loaded a second time, and the reference is not computed again."""
    monkeypatch.setattr("blockwright.plugins.alignment.tasks.pairs.load", lambda *a, **k: pytest.fail("a second model"))
    train(2, init_from=start)[2].save_checkpoint(folder / "stop.ckpt")
    monkeypatch.setattr(Preference, "_compute", lambda self: pytest.fail("computed again"))
    rest = train(4, ckpt_path=folder / "stop.ckpt")[1]
    assert all(torch.equal(a, b) for a, b in zip(whole[1].weights[2:], rest.weights, strict=True))


@pytest.mark.slow
def test_reference_that_is_gone_is_computed_again_or_refused(train: Make, whole: Any, start: str, folder: Path) -> None:
    train(2, init_from=start)[2].save_checkpoint(folder / "stop.ckpt")
    for file in (folder / "cache").glob("reference-*.npz"):
        file.write_bytes(file.read_bytes()[:100])  # as good as gone
    rest = train(4, ckpt_path=folder / "stop.ckpt", reference=start)[1]
    torch.testing.assert_close(rest.weights[-1], whole[1].weights[-1], atol=1e-6, rtol=0)
    for file in (folder / "cache").glob("reference-*.npz"):
        file.unlink()
    for reference in (None, str(folder / "stop.ckpt")):  # which holds another model
        with pytest.raises(ConfigError) as refusal:
            train(4, ckpt_path=folder / "stop.ckpt", reference=reference)
        assert refusal.value.path == "task.reference"


def test_reference_is_the_model_as_it_begins_also_where_it_was_changed(
    train: Make, tiny: Make, start: str, folder: Path
) -> None:
    """Not the log-probabilities that were stored of the same weights in another model, nor any if its own are gone."""
    changed = tiny(moe=True, vocab_size=16, init={"std": 0.3}, gating={"name": "softmax_topk", "top_k": 1})
    for given in ({}, {"model": changed}):
        _, watch, trainer = train(1, init_from=start, **given)
        assert watch.figures[0]["train/loss"] == pytest.approx(LOSS, abs=1e-6)
    trainer.save_checkpoint(folder / "changed.ckpt")
    for file in (folder / "cache").glob("reference-*.npz"):
        file.unlink()
    with pytest.raises(ConfigError) as refusal:
        train(2, init_from=start, model=changed, ckpt_path=folder / "changed.ckpt")
    assert refusal.value.path == "task.reference"


def test_micro_batches_count_together_and_a_figure_that_a_task_adds_is_its_own_to_log(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step's mean is over the pairs of both."""
    monkeypatch.setattr(Preference, "figures", (*Preference.figures, Figure("f1", "of answers", "more")))
    totals = AfterBackward(lambda task: float(task.step._totals["total"]))
    train(1, accumulate=2, preference="simpo", callbacks=[totals])
    assert totals.found == [8.0, 8.0]
    assert "val/accuracy" in train(1, preference="simpo")[2].callback_metrics


@pytest.mark.slow
def test_reward_model_learns_and_scores_completions(train: Make, start: str, folder: Path) -> None:
    task, watch, trainer = train(12, "reward", init_from=start, centre=0.01)
    assert watch.figures[-1]["train/accuracy"] > watch.figures[0]["train/accuracy"]
    trainer.save_checkpoint(folder / "judge.ckpt")
    node = {"name": "reward_model", "run": str(folder / "judge.ckpt"), "batch_size": 3}
    reward = registry.build("reward", Node(node, "task.reward"), Scope({}, {}, own=True))
    found = list(trainer.datamodule.corpus.conversations("train"))[:8]
    batch = trainer.datamodule._packed("train", 24).__getitems__(list(range(8)))
    with torch.no_grad():
        hidden, _ = task.model.eval().hidden(batch["tokens"], batch["positions"], batch["segments"])
        _, chosen, rejected = task.compare(hidden, batch, "val")
    for expected, side in ((chosen, "messages"), (rejected, "rejected")):
        talks = [getattr(pair, side) for pair in found]
        columns: dict[str, Any] = {"messages": [talk[:-1] for talk in talks], "n_tokens": [0] * 8}
        scores = reward([""] * 8, [talk[-1]["content"] for talk in talks], **columns)
        assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert math.isnan(reward(["1" * 99], ["1"])[0])  # type: ignore[arg-type]  # longer than its positions: a failure


def test_what_cannot_work_is_refused(train: Make, tiny: Make, start: str) -> None:
    judge = Node({"name": "reward_model", "run": start}, "task.reward")  # which is no reward model
    predicting = {"preference": "simpo", "model": tiny(vocab_size=16, mtp={"depth": 1})}
    for path, act in (
        ("task.reference", lambda: train(1)),  # no weights that it began with
        ("task.reference", lambda: train(1, init_from=start, reference="nowhere")),
        ("task.preference.name", lambda: train(1, preference="dpo")),
        ("task.frozen", lambda: train(1, **predicting)),  # its depths are not trained
        ("task.reward.run", lambda: registry.build("reward", judge, Scope({}, {}, own=True))),
    ):
        with pytest.raises(ConfigError) as refusal:
            act()
        assert refusal.value.path == path
