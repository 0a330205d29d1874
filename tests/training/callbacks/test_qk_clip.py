"""Heads whose scores have grown too large are scaled down to the threshold, and nothing else moves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from many_ranks import DEEPSEEK, DENSE, Descent, far, read_model, spawn, train
from torch import Tensor

from blockwright.blocks.forward_pass import Pass
from blockwright.registry import ConfigError
from blockwright.training.callbacks.guard import Guard
from blockwright.training.callbacks.step_end import QKClip, _Watched, clip_factors
from blockwright.training.schedulers import Constant
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup

MLA = {"name": "mla", "n_heads": 3, "kv_lora_rank": 11, "qk_nope_head_dim": 7, "qk_rope_head_dim": 4, "v_head_dim": 9}
NODES: dict[str, dict[str, Any]] = {
    "mha": {"name": "mha", "n_heads": 3},
    "mha, biased": {"name": "mha", "n_heads": 3, "bias": True},
    "gqa": {"name": "gqa", "n_heads": 6, "n_kv_heads": 2},
    "mqa": {"name": "mqa", "n_heads": 4},
    "mla": MLA,
    "mla, compressed queries": {**MLA, "q_lora_rank": 13},
}
IDS = torch.tensor([[0] * 4 + [1] * 9])
PLACES = torch.cat((torch.arange(4), torch.arange(9)))[None]


class Seen(L.Callback):
    """What is logged at each step, and the weights after it."""

    def __init__(self) -> None:
        self.largest: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, task: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.largest.append(float(trainer.callback_metrics["train/largest_score"]))
            self.weights.append({name: t.detach().clone() for name, t in task.decoder.named_parameters()})


class Still(Descent):
    def build(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=0.0)


@pytest.mark.parametrize("name", NODES)
def test_scores_of_the_same_batch_are_at_most_the_threshold_afterwards(make_block: Any, name: str) -> None:
    block = make_block("attention", NODES[name], around={"position": "rope"})
    watched = _Watched(block, block.score_rows())
    x = torch.randn(1, 13, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def largest() -> Tensor:
        block(x, Pass(PLACES, segments=IDS))
        return watched.take(0)

    before, weights = largest(), {name: p.detach().clone() for name, p in block.named_parameters()}
    threshold = float(before.sort().values[-2] if watched.n_groups > 1 else before.max() * 0.7)
    watched.scale(clip_factors(before, threshold), 0.3)
    after = largest()
    assert after.max() <= threshold * (1 + 1e-12) < before.max()
    groups = (
        (before.view(watched.n_groups, -1) > threshold).any(1).repeat_interleave(watched.n_heads // watched.n_groups)
    )
    torch.testing.assert_close(after[~groups], before[~groups], rtol=1e-12, atol=0)
    if watched.n_groups == watched.n_heads:
        torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-12, atol=0)
    moved = {name for name, p in block.named_parameters() if not torch.equal(p, weights[name])}
    assert moved == {rows.name for rows in block.score_rows()}
    for rows in block.score_rows():  # a head below the threshold keeps every bit
        parts = [t.unflatten(0, (-1, rows.height)) for t in (weights[rows.name], watched.weights[rows.name].detach())]
        calm = ~groups.view(len(parts[0]), -1)[:, 0]
        assert torch.equal(parts[0][calm], parts[1][calm])


def test_run_below_the_threshold_is_the_run_without_it() -> None:
    clip, seen = QKClip(1e6), Seen()
    one, two = train(DEEPSEEK, steps=2), train(DEEPSEEK, steps=2, callbacks=[clip, seen])
    assert all(torch.equal(one["weights"][name], two["weights"][name]) for name in one["weights"])
    assert all(0 < value < 1e3 for value in seen.largest)


def test_numbers_that_are_not_finite_clip_nothing() -> None:
    largest = torch.tensor([-3.0, 50.0, 200.0, float("inf"), float("nan"), float("-inf")])
    assert clip_factors(largest, 100.0).tolist() == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0]


def test_micro_batches_of_a_step_are_measured_together() -> None:
    apart, together = Seen(), Seen()
    model = DENSE.replace("position: rope", "position: none")
    train(model, steps=4, optimizer=Still(), callbacks=[QKClip(1e6), apart])
    train(model, steps=1, optimizer=Still(), callbacks=[QKClip(1e6), together], accumulate_grad_batches=4)
    assert together.largest == [max(apart.largest)]
    assert max(apart.largest) not in (apart.largest[0], apart.largest[-1])


@pytest.mark.slow
def test_clipped_run_resumes_exactly(tmp_path: Path) -> None:
    saved = str(tmp_path / "two.ckpt")
    whole, seen = train(DEEPSEEK, steps=4, callbacks=[QKClip(0.02), Seen()]), Seen()
    train(DEEPSEEK, steps=2, callbacks=[QKClip(0.02)], save=saved)
    rest = train(DEEPSEEK, steps=4, callbacks=[QKClip(0.02), seen], ckpt_path=saved)
    assert all(torch.equal(whole["weights"][name], rest["weights"][name]) for name in whole["weights"])
    assert all(value > 0.02 for value in seen.largest)  # it was at work


def test_skipped_step_clips_nothing() -> None:
    class Poison(L.Callback):
        def on_after_backward(self, trainer: Any, task: Any) -> None:
            if trainer.global_step == 1:
                task.decoder.norm.weight.grad.fill_(float("nan"))

    seen = Seen()
    with pytest.warns(UserWarning, match="step 1 is skipped"):
        train(DENSE, steps=3, callbacks=[Poison(), Guard(), QKClip(0.01), seen])
    first, second, third = seen.weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(second["layers.0.attention.query.weight"], third["layers.0.attention.query.weight"])


STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": {}, "tp": {"tensor": 2, "shard": 1}}


@pytest.mark.slow
def test_ranks_clip_like_one_process() -> None:
    def run(model: str, **how: Any) -> dict[str, Any]:
        def own(trainer: L.Trainer, task: Any) -> Any:
            return {
                name: getattr(p, "_local_tensor", p).detach().clone() for name, p in task.decoder.named_parameters()
            }

        return train(model, steps=3, optimizer=Descent(), double=True, callbacks=[QKClip(0.02)], then=own, **how)

    models = (DENSE, DEEPSEEK.replace("q_lora_rank: 12", "q_lora_rank: null"))

    def all_() -> dict[str, Any]:
        return {(name, m): run(m, strategy=how, devices=2) for name, how in STRATEGIES.items() for m in models}

    ranks = spawn(2, all_)
    for (name, model), found in ranks[0].items():
        losses, weights = far(found, run(model))
        assert losses < 1e-9 and weights < 1e-8, name
        if name == "ddp":
            other = ranks[1][name, model]["extra"]
            assert all(torch.equal(own, other[key]) for key, own in found["extra"].items())


def test_attentions_without_rows_are_left_out_in_one_warning() -> None:
    linear = "\nvariants: {attention: {linear: {name: gated_delta, n_heads: 4}}}\n"
    mixed = DENSE.replace("layout:", "").strip() + linear
    mixed = mixed.replace("n_layers: 2", "n_layers: 3") + "layout: {attention: linear*2 attention}\n"
    seen = Seen()
    with pytest.warns(UserWarning, match=r"leaves out GatedDelta \(2 layers\): no scores"):
        train(mixed, steps=1, callbacks=[QKClip(0.01), seen])
    assert seen.largest[0] > 0


def test_model_with_nothing_to_clip_and_ranks_that_share_windows_are_refused() -> None:
    normalised = DENSE.replace("position: rope", "position: rope\nqk_norm: per_head")
    for model, own in ((normalised, {}), (DENSE, {"frozen": ["attention"]})):
        with pytest.raises(ConfigError, match=r"callbacks\.qk_clip.*GQA \(2 layers\)"):
            train(model, steps=1, callbacks=[QKClip()], task=own)
    task = CausalLM(Setup(read_model(DENSE), Descent(), Constant()))
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(meshes=SimpleNamespace(context=object())))
    with pytest.raises(ConfigError, match=r"callbacks\.qk_clip.*without trainer\.strategy\.context"):
        QKClip().on_train_start(trainer, task)


def test_settings_that_bound_nothing_are_refused() -> None:
    for key, value in (("threshold", 0.0), ("alpha", 1.5)):
        with pytest.raises(ConfigError) as caught:
            QKClip(**{key: value})
        assert caught.value.path == f"callbacks.qk_clip.{key}"
