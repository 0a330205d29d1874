"""Policy optimisation on a model of two layers: rollouts, their log-probabilities, updates, refusals."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from aligned import MLA, AfterBackward, Watch, prompts, says, trainer

import blockwright.blocks.kernels.log_probabilities as chunks
import blockwright.plugins.alignment.rollouts.engine.native as native
from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.linear import is_adapter
from blockwright.plugins.alignment.rollouts.engine.native import Native, Request
from blockwright.plugins.alignment.rollouts.record import Rollout, completion_mask, padded, score
from blockwright.plugins.alignment.tasks.grpo import Grpo
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant
from blockwright.training.starts import Lora
from tests import built

PROMPTS = [[5, 3, 9], [7], [2, 2, 4, 4, 1]]
ENDS = {1, 2, 3}
Make = Callable[..., Any]


@pytest.fixture
def model(tiny: Make, randomise: Make) -> Make:
    def make(**changes: Any) -> Any:
        made = compose(tiny(moe=True, vocab_size=16, **changes), seed=1)
        randomise(made, scale=2.0)
        return made.eval()

    return make


@pytest.fixture
def decoder(model: Make) -> Any:
    return model()


def sample(decoder: Any, prompts: Any, seeds: Any, n: int, how: Any = 1.0, ends: Any = ENDS, **more: Any) -> Rollout:
    sampling = how if isinstance(how, Sampling) else Sampling(how)
    return Native().sample(decoder, Request(prompts, seeds, n, sampling, ends, **more))


@pytest.mark.parametrize("changes", [{"attention": MLA}, {"attention": {"name": "gqa"}, "position": {"name": "alibi"}}])
def test_log_probability_of_sampling_is_that_of_training(model: Make, changes: dict[str, Any]) -> None:
    """Left-padded decoding with caches, packed training rows, and one plain forward pass for each row agree."""
    decoder = model(**changes)
    found = sample(decoder, PROMPTS, [11, 12, 13], 9, 0.7)
    mask = completion_mask(found)
    logp = score(decoder, found, 0.7).logp
    torch.testing.assert_close(logp * mask, padded(found.sampler), atol=1e-5, rtol=0)
    for i, (prompt, completion) in enumerate(zip(found.prompts, found.completions, strict=True)):
        logits = decoder(torch.tensor([[*prompt, *completion]]))[0, len(prompt) - 1 : -1] / 0.7
        plain = logits.log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(logp[i, : len(completion)], plain, atol=1e-5, rtol=0)
    assert not logp[~mask].any() and len({len(c) for c in found.completions}) > 1


def test_completion_ends_with_its_end_and_depends_on_its_seed_alone(decoder: Any) -> None:
    together = sample(decoder, PROMPTS, [11, 12, 13], 30)
    for completion, ended in zip(together.completions, together.ended, strict=True):
        assert not ENDS & set(completion[:-1]) and ended == (completion[-1] in ENDS)
    alone = [sample(decoder, [p], [s], 30) for p, s in zip(PROMPTS, (11, 12, 13), strict=True)]
    assert [a.completions[0] for a in alone] == together.completions
    assert sample(decoder, PROMPTS, [14, 15, 16], 30).completions != together.completions


def test_prompt_is_read_once_and_ended_rows_leave(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    read = native.read  # type: ignore[attr-defined]
    monkeypatch.setattr(native, "read", lambda d, tokens, c: shapes.append(tuple(tokens.shape)) or read(d, tokens, c))
    everything = set(range(16))
    assert sample(decoder, PROMPTS, [1, 2, 3], 5, 1.0, everything).ended == [True] * 3 and len(shapes) == 1
    sample(decoder, PROMPTS, [1, 2, 3], 5, 1.0, everything, together=True)
    assert len(shapes) == 6
    assert [len(c) for c in sample(decoder, PROMPTS, [1, 2, 3], 5, 1.0, set()).completions] == [5] * 3
    shapes.clear()
    seeds = list(range(24))
    found = sample(decoder, PROMPTS, seeds, 12)
    assert shapes[0] == (3, 5) and shapes[1][1] == 1 and shapes[-1][0] < 12
    lengths = sorted((len(c) for c in found.completions), reverse=True)
    assert all(rows <= 24 and rows < 2 * sum(n > i for n in lengths) for i, (rows, _) in enumerate(shapes[1:], start=1))
    monkeypatch.undo()
    apart = sample(decoder, [p for p in PROMPTS for _ in range(8)], seeds, 12)
    assert apart.completions == found.completions and apart.prompts == found.prompts
    for one, other in zip(apart.experts, found.experts, strict=True):
        assert all(map(torch.equal, one, other))


def test_update_is_normalised_over_the_tokens_that_were_sampled_among(decoder: Any) -> None:
    for how in ({"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9}):
        found = sample(decoder, PROMPTS, range(12), 9, Sampling(0.9, **how), {1, 2})
        logp, mask = score(decoder, found, 0.9).logp, completion_mask(found)
        torch.testing.assert_close(logp * mask, padded(found.sampler), atol=1e-5, rtol=0)
        for completion, kept in zip(found.completions, found.kept, strict=True):
            assert set(enumerate(completion)) <= set(map(tuple, kept.T.tolist()))
            assert "top_k" not in how or torch.bincount(kept[0]).max() <= how["top_k"]
        everything = replace(found, kept=[])
        assert (score(decoder, everything, 0.9).logp - logp)[mask].min() < -0.02  # the mass of what was left out


def test_chunks_of_logits_change_neither_values_nor_gradients(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sample(decoder.double(), PROMPTS, range(6), 9, Sampling(0.9, top_p=0.8), {1, 2})
    results = []
    for shape in ((1000, 16), (4, 16), (5, 7)):
        monkeypatch.setattr(chunks, "chunk_shape", lambda *_, shape=shape: shape)
        decoder.zero_grad()
        logp = score(decoder, found, 0.9).logp
        logp.square().sum().backward()
        results.append((logp.detach(), [p.grad.clone() for p in decoder.parameters() if p.grad is not None]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-10, rtol=1e-8)


def test_replay_weighs_the_experts_of_the_rollout(model: Make) -> None:
    """In bf16 sampling and training choose other experts for some tokens; replayed, for none, and the router learns."""
    sixteen = {"ffn": {"name": "moe", "n_experts": 16}, "gating": {"name": "softmax_topk", "top_k": 4}}
    decoder = model(attention=MLA, **sixteen)
    exact, seeds = deepcopy(decoder).double().eval(), range(96)
    found = sample(exact, PROMPTS, seeds, 9, 1.0, {1})
    scored = score(exact, found, 1.0, replay=True)
    assert not scored.rerouted and scored.routed == sum(len(e) for row in found.experts for e in row) > 0
    ratio = (scored.logp - padded(found.sampler)).exp()
    assert (ratio - 1).abs().max() < 1e-6
    decoder = decoder.eval().to(torch.bfloat16)
    found = sample(decoder, PROMPTS, seeds, 9, 1.0, {1})
    free, replayed = score(decoder, found, 1.0), score(decoder, found, 1.0, replay=True)
    assert free.rerouted > 0 and replayed.rerouted == 0
    gates = [m for m in decoder.modules() if isinstance(m, Gating)]
    for gate in gates:  # another router: the choice stays, its weights and gradients are the present one's
        gate.weight.data.normal_(generator=torch.Generator().manual_seed(3))
    moved = score(decoder, found, 1.0, replay=True)
    assert moved.rerouted == 0 and score(decoder, found, 1.0).rerouted > 0.5 * moved.routed
    assert not torch.allclose(moved.logp, replayed.logp, atol=1e-3)
    moved.logp.sum().backward()
    assert all(gate.weight.grad.any() for gate in gates)


# ---- runs ------------------------------------------------------------------------------------------------------------


def _fails(text: str) -> float:
    raise RuntimeError("no judge")


REWARDS: dict[str, Callable[[str], Any]] = {
    "even": lambda text: float(len(text) % 2 == 0),  # learnable at once
    "seldom": lambda text: float(text.count("7") > 1),  # groups without any are frequent
    "constantly": lambda text: 0.5,
    "reluctant": lambda text: 10**400 if "7" in text else 1 if len(text) % 2 else None,  # no number, 1, no opinion
    "failing": _fails,
}


@pytest.fixture
def train(tiny: Make, tmp_path: Path, temporary_blocks: None) -> Make:
    for name, of in REWARDS.items():
        registry.register("reward", name)(says(of))

    def run(
        steps: int = 1,
        updates: int = 1,
        find: Any = None,
        callbacks: Any = (),
        accumulate: int = 1,
        model: Any = None,
        validate: int = 0,
        precision: Any = "32-true",
        **task: Any,
    ) -> tuple[Grpo, list[Any], L.Trainer]:
        """``find``: what is kept of the task after each backward pass."""
        model = model or tiny(moe=True, vocab_size=16, attention=MLA, init={"std": 0.3})
        given = {"reward": "even", "group_size": 4, "max_new_tokens": 6, **task}
        made = built.task("grpo", model, AdamW(lr=3e-3, weight_decay=0.0), Constant(warmup=1), **given)
        kept = AfterBackward(find or (lambda task: next(iter(task.rollouts.whole.values()))))
        how = {"precision": precision, "accumulate_grad_batches": accumulate, "limit_val_batches": validate}
        how |= {} if validate else {"val_check_interval": None, "check_val_every_n_epoch": 1}
        by = trainer(tmp_path, steps, callbacks=[kept, *callbacks], **how)
        by.fit(made, prompts(tmp_path, updates), weights_only=True)
        return made, kept.found, by

    return run


def test_update_raises_what_was_good_and_lowers_what_was_bad(train: Make) -> None:
    def before(task: Any) -> Any:
        found = next(iter(task.rollouts.whole.values()))
        with torch.no_grad():
            logp = score(task.model.eval(), found, 1.0).logp
        task.model.train()
        return found, logp

    task, ((found, logp),), trainer = train(find=before)
    with torch.no_grad():
        change = ((score(task.model.eval(), found, 1.0).logp - logp) * completion_mask(found)).sum(1)
    advantage = torch.tensor(found.advantage)
    assert (advantage > 0).any() and (advantage < 0).any()
    assert change[advantage > 0].mean() > 0 > change[advantage < 0].mean()
    figures = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    names = ("reward", "reward_std", "zero_spread", "length", "truncated", "entropy", "clip_low", "clip_high")
    assert {f"train/{name}" for name in names} <= set(figures)
    even = sum(len(task.data.tokenizer.decode(c)) % 2 == 0 for c in found.completions)
    assert figures["train/reward"] == pytest.approx(even / len(found)) and figures["train/sampler_gap"] < 1e-5


def test_reward_without_spread_and_failing_reward_change_nothing(train: Make) -> None:
    for reward in ("constantly", "failing"):
        if reward == "failing":
            with pytest.warns(UserWarning, match="16 of 16 completions"):
                task, (rollout,), trainer = train(reward=reward, resamples=2)
            assert (
                trainer.callback_metrics["train/reward_failures"] == 1
            )  # of those that were kept, not of both samplings
            assert trainer.callback_metrics["train/reward"].isnan() and trainer.callback_metrics["train/judged"] == 0
        else:
            task, (rollout,), _ = train(reward=reward)
        # Balance losses alone move routers, and what leads to them.
        head = task.model.output_weight
        assert not any(rollout.advantage) and (head.grad is None or not head.grad.any())


def test_figures_are_of_the_completions_that_have_a_reward(train: Make) -> None:
    """In training and on held-out prompts; what has none counts as no 0, and failures are a figure."""
    with pytest.warns(UserWarning, match="reluctant"):
        task, (rollout,), trainer = train(reward="reluctant", validate=1)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
    texts = [task.data.tokenizer.decode(c) for c in rollout.completions]
    judged = [len(text) % 2 == 1 and "7" not in text for text in texts]
    failed = ["7" in text for text in texts]
    assert 0 < sum(judged) < len(texts) and any(failed)
    assert figures["train/reward"] == 1 and figures["train/judged"] == pytest.approx(sum(judged) / len(texts))
    assert figures["train/reward_failures"] == pytest.approx(sum(failed) / len(texts))
    assert figures["train/zero_spread"] == 1 and not any(rollout.advantage)  # all that is judged is equal
    assert figures["val/reward"] == figures["val/greedy"] == 1 and 0 < figures["val/judged"] < 1
    assert 0 < figures["val/reward_failures"] < 1
    assert {reward for _, _, reward in task.held_out.samples} == {1.0, None}


def test_groups_without_spread_are_replaced(train: Make) -> None:
    """By groups of other prompts, as often as is allowed; what still has none stays, and all of it is counted."""
    rollouts = {n: train(reward="seldom", resamples=n)[1][0] for n in (0, 6)}
    groups = {n: torch.tensor(r.advantage).view(4, 4).ne(0).any(1) for n, r in rollouts.items()}
    flat = [int((~g).sum()) for g in groups.values()]
    assert flat[0] >= 2 and flat[0] > flat[1]
    for n, rollout in rollouts.items():
        assert rollout.figures["zero_spread"] == 4 * (~groups[n]).sum()
        assert rollout.figures["replaced"] == (0 if n == 0 else 4 * flat[0])
    first, last = rollouts[0], rollouts[6]
    for group, spread in enumerate(groups[0].tolist()):
        rows = slice(4 * group, 4 * group + 4)
        assert (first.completions[rows] == last.completions[rows]) == spread
        assert len({tuple(p) for p in last.prompts[rows]}) == 1
    lengths = [len(p) + len(c) - 1 for p, c in zip(last.prompts, last.completions, strict=True)]
    assert [len(row[0]) for row in last.experts] == lengths  # all that belongs to a completion was replaced


def test_text_is_sampled_while_a_step_is_prepared_and_each_update_takes_other_completions(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, sampled, seen = list[str](), list[list[str]](), list[Any]()

    def watched(name: str) -> None:
        method = getattr(Grpo, name)

        def call(self: Grpo, batch: Any, *rest: Any) -> Any:
            inside.append(name)
            try:
                return method(self, batch, *rest)
            finally:
                inside.pop()

        monkeypatch.setattr(Grpo, name, call)

    class Parts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
            number = int(batch["rollout"][0])
            part, whole = task.rollout_of(batch), task.rollouts.whole[number]
            seen.append((number, len(part), sorted(map(tuple, whole.completions)), part.completions))

    draw = Grpo._sample
    monkeypatch.setattr(Grpo, "_sample", lambda self, *rest: (sampled.append([*inside]), draw(self, *rest))[1])
    for name in ("prepare", "counts", "objective", "tokens_of"):
        watched(name)
    train(4, updates=2, callbacks=[Parts()])
    assert sampled == [["prepare"], ["prepare"]]
    assert [number for number, *_ in seen] == [0, 0, 1, 1] and all(n == 8 for _, n, _, _ in seen)
    for (_, _, whole, a), (_, _, _, b) in (seen[:2], seen[2:]):
        assert sorted(map(tuple, [*a, *b])) == whole
    assert seen[0][2] != seen[2][2]


def test_ratio_of_a_first_update_is_1(train: Make) -> None:
    """With MLA, experts that are replayed, and several updates of a rollout, whose first changes the weights."""

    def away(task: Any) -> float:
        rollout, logp = task._updated
        return float((((logp - padded(rollout.old)) * completion_mask(rollout)).exp() - 1).abs().max())

    _, found, trainer = train(4, updates=2, replay=True, find=away, precision="bf16-mixed")
    assert found[0] == found[2] == 0  # the same computation, bit-identical
    assert min(found[1], found[3]) > 1e-3 and trainer.callback_metrics["train/rerouted"] == 0


@pytest.mark.slow
def test_penalty_pulls_towards_the_reference(train: Make, tmp_path: Path) -> None:
    train()[2].save_checkpoint(tmp_path / "start.ckpt")
    start = {"init_from": str(tmp_path / "start.ckpt"), "reference": str(tmp_path / "start.ckpt")}
    first, _, trainer = train(penalty={"name": "k3", "beta": 0.5}, **start)
    assert trainer.callback_metrics["train/kl"] == pytest.approx(0, abs=1e-6)  # the policy is the reference
    kl = [train(6, penalty={"name": "k3", "beta": beta}, **start)[2].callback_metrics["train/kl"] for beta in (1e-6, 3)]
    assert kl[0] > 2 * kl[1] > 0
    assert not any(name.startswith("_held") for name, _ in first.named_parameters())


@pytest.mark.slow
def test_penalty_of_an_adapter_compares_with_the_model_without_it(train: Make) -> None:
    """In no further memory: the KL is 0 while the adapter is new, and that of a second model afterwards."""
    how = {"penalty": {"name": "k3", "beta": 0.5}, "starts": [Lora(["attention"], rank=2)]}
    first, _, trainer = train(**how)
    assert trainer.callback_metrics["train/kl"] == pytest.approx(0, abs=1e-9) and not first._reference_model
    later, _, trainer = train(4, **how)
    assert trainer.callback_metrics["train/kl"] > 1e-6
    base = compose(later.model_config)
    base.load_state_dict({name: t for name, t in later.model.state_dict().items() if not is_adapter(name)})
    rollout = later.rollouts.whole[max(later.rollouts.whole)]
    reference = later._reference_logp(rollout)
    assert torch.equal(reference, score(base, rollout, 1.0).logp)
    assert not torch.equal(reference, score(later.model, rollout, 1.0).logp)


def test_other_objectives_train(train: Make) -> None:
    objective = {"surrogate": "cispo", "ratio": "sequence", "average": "constant"}
    watch = Watch()
    train(2, updates=2, callbacks=[watch], **objective)
    assert watch.weights[-1].isfinite().all() and not torch.equal(*watch.weights[-2:])


def test_accumulated_micro_batches_count_together(train: Make) -> None:
    """The step's denominator holds the completions of both micro-batches, whose rollouts come before the first."""
    totals = train(
        accumulate=2, find=lambda task: (float(task.step._totals["completions"]), sorted(task.rollouts.whole))
    )[1]
    assert totals == [(32.0, [0, 1]), (32.0, [0, 1])]


LONGROPE = {"name": "longrope", "original_positions": 8}
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # path, settings, changes of the model
    ("task.group_size", {"group_size": 1}, {}),
    ("task.temperature", {"temperature": 0.0}, {}),
    ("task.top_p", {"top_p": 0.0}, {}),
    ("task.reference", {"penalty": "k3"}, {}),
    ("task.reference", {"penalty": "k3", "reference": "nowhere"}, {}),
    ("task.reward", {"reward": {"name": "exact_match", "answer": "solution"}}, {}),  # which all records lack
    ("task.reward.name", {"reward": "exact"}, {}),
    ("task.surrogate.lo", {"surrogate": {"name": "clip", "lo": 0.1}}, {}),
    ("data.updates", {"updates": 3}, {}),  # of 16 completions
    ("data.updates", {"updates": 2, "accumulate": 2}, {}),
    ("task.max_new_tokens", {"max_new_tokens": 60}, {"position": {"name": "learned"}}),  # of 64 positions
    ("model.position.length", {}, {"position": LONGROPE}),  # as short sequences, or as long ones
    ("model.gating", {}, {"gating": {"name": "expert_choice"}}),  # which look at all tokens of a batch
    ("model.gating", {}, {"gating": {"name": "sinkhorn"}}),
]


@pytest.mark.parametrize(("path", "settings", "changes"), REFUSED)
def test_what_cannot_work_is_refused(train: Make, tiny: Make, path: str, settings: Any, changes: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        train(model=tiny(moe="gating" in changes, vocab_size=16, **changes), **settings)
    assert refusal.value.path == path


def test_sampler_and_update_rotate_alike(train: Make, tiny: Make) -> None:
    """LongRoPE's length of a sampler is the room of its caches, and of an update the longest sequence of its rows."""
    figures = train(model=tiny(vocab_size=16, position={**LONGROPE, "length": 64}))[2].callback_metrics
    assert figures["train/sampler_gap"] < 1e-5
