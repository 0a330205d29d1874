"""Recovery after surgery: each loss against its formula, stages by tokens, and a run that comes nearer its teacher."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F

from blockwright.blocks.compose import compose
from blockwright.plugins.alignment.teaching import Language, Layers, Lesson, Logits
from blockwright.registry import BlockError, ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from tests import built

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def lesson(tiny: Make) -> Lesson:
    student = compose(tiny(attention={"name": "kda", "n_heads": 4}, init={"std": 0.2, "depth_scaled": False}), seed=1)
    teacher = compose(tiny(init={"std": 0.2, "depth_scaled": False}), seed=0)
    tokens, targets = torch.randint(61, (2, 3, 11)).unbind(0)
    targets[0, 4] = -100
    return Lesson(student, teacher.requires_grad_(False), tokens, targets)


def test_logits_are_learnt_by_their_divergence_and_language_by_the_next_token(lesson: Lesson) -> None:
    loss, _ = Logits(2.0)(lesson)
    p, q = (F.softmax(model(lesson.tokens) / 2, -1) for model in (lesson.teacher, lesson.student))
    torch.testing.assert_close(loss, 4 * (p * (p.log() - q.log())).sum(-1))
    same = Lesson(lesson.teacher, lesson.teacher, lesson.tokens, lesson.targets)
    assert Logits()(same)[0].abs().max() < 1e-6
    loss, _ = Language()(lesson)
    torch.testing.assert_close(loss.sum(), lesson.student.nll(lesson.student.hidden(lesson.tokens)[0], lesson.targets))
    assert loss[0, 4] == 0


def test_layers_are_aligned_on_what_the_teachers_read(lesson: Lesson, tiny: Make) -> None:
    """And nothing but the changed blocks gets a gradient."""
    loss, routings = Layers()(lesson)
    read: list[Any] = []
    for layer in lesson.teacher.layers:
        layer.attention.register_forward_pre_hook(lambda module, given: read.append(given))
    lesson.teacher.hidden(lesson.tokens)
    expected = []
    for mine, theirs, given in zip(lesson.student.layers, lesson.teacher.layers, read[:2], strict=True):
        y, wanted = mine.attention(*given), theirs.attention(*given)
        expected.append((y - wanted).square().sum(-1) / wanted.square().sum(-1).mean())
    torch.testing.assert_close(loss, torch.stack(expected).mean(0))
    loss.sum().backward()
    learns = {name for name, p in lesson.student.named_parameters() if p.grad is not None}
    assert learns == {n for n, _ in lesson.student.named_parameters() if ".attention." in n}
    assert routings == [None, None]
    routings = Layers()(Lesson(compose(tiny(moe=True)), compose(tiny()), lesson.tokens, lesson.targets))[1]
    assert routings[0] is None and routings[1] is not None
    for changes in ({}, {"n_layers": 3}):  # none changed; not the teacher's two
        with pytest.raises(BlockError):
            Layers()(Lesson(compose(tiny(**changes)), compose(tiny()), lesson.tokens, lesson.tokens))


def make_task(model: dict[str, Any], stages: str) -> Any:
    return built.task("distill", model, AdamW(), Constant(), teacher="START", stages=yaml.safe_load(stages))


def test_stages_follow_each_other_by_tokens_or_are_refused(tiny: Make) -> None:
    stages = "[{loss: layers, tokens: 100}, {loss: {name: logits, temperature: 2}, tokens: 50}, {loss: language}]"
    task = make_task(tiny(), stages)
    assert [task.stage_at(seen) for seen in (0, 99, 100, 149, 150, 10**9)] == [0, 0, 1, 1, 2, 2]
    assert task.stages[1].loss.temperature == 2
    for stages, path in (
        ("[]", ""),
        ("[{loss: logits}, {loss: language}]", ""),
        ("[{loss: logit}]", ".0.loss.name"),
        ("[{loss: logits, token: 3}]", ".0.token"),
        ("[{loss: logits, tokens: 0}]", ".0.tokens"),
        ("[{tokens: 3}]", ".0"),
    ):
        with pytest.raises(ConfigError) as caught:
            make_task(tiny(), stages)
        assert caught.value.path == f"task.stages{path}"


@pytest.mark.slow
def test_run_passes_its_stages_and_comes_nearer_the_teacher(
    small: list[str], train_py: Callable[..., Any], tmp_path: Path
) -> None:
    """64 tokens per step: two steps align layers, four learn logits with the head frozen."""
    dense = ["model/attention=mha", "model.attention.n_heads=4", "model/ffn=swiglu", "model.layout.ffn=ffn*"]
    quick = [*small, *dense, "callbacks.report=null", f"paths.log_dir={tmp_path / 'logs'}"]
    first = train_py(*quick, f"hydra.run.dir={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr
    mixer = ["model/attention=kda", "model.attention.n_heads=4", "surgery=default", "task=distill"]
    stages = "task.stages=[{loss: layers, tokens: 128}, {loss: logits, frozen: [head]}]"
    second = train_py(*quick, *mixer, stages, f"init_from={tmp_path / 'first'}", f"hydra.run.dir={tmp_path / 'second'}")
    assert second.returncode == 0, second.stderr
    rows = csv.DictReader(next((tmp_path / "second").rglob("metrics.csv")).open())
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert losses[1] < losses[0] and losses[-1] < losses[2]
    ends = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("first", "second")]
    assert ends[1]["counted"]["tokens"] == 6 * 64
    before, after = (found["state_dict"] for found in ends)
    same = {name for name in before.keys() & after.keys() if torch.equal(before[name], after[name])}
    assert "decoder.head.weight" in same and not {"decoder.embedding.weight", "decoder.norm.weight"} & same
