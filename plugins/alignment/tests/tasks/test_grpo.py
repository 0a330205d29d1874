"""Policy optimisation on a model of two layers: rollouts, their log-probabilities, updates, resuming, refusals."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.generation.sample import Sampling
from blockwright.blocks.lora import is_adapter
from blockwright.plugins.alignment.rewards.base import Reward
from blockwright.plugins.alignment.rollouts.engine.base import Request
from blockwright.plugins.alignment.rollouts.engine.native import Native
from blockwright.plugins.alignment.rollouts.record import Rollout, completion_mask, padded
from blockwright.plugins.alignment.rollouts.scoring import score
from blockwright.plugins.alignment.tasks.grpo import Grpo
from blockwright.registry import ConfigError
from blockwright.training.data.sorting import Sorting
from blockwright.training.data.tokenizers.chars import Chars
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers.constant import Constant
from blockwright.training.starts.adapter import Lora
from tests import built

PROMPTS = [[5, 3, 9], [7], [2, 2, 4, 4, 1]]
Make = Callable[..., Any]
MLA = {"name": "mla", "n_heads": 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


@pytest.fixture
def decoder(tiny: Make, randomise: Make, request: pytest.FixtureRequest) -> Any:
    made = compose(tiny(moe=True, vocab_size=16, **getattr(request, "param", {})), seed=1)
    randomise(made, scale=2.0)
    return made.eval()


ATTENTIONS = [{"attention": MLA}, {"attention": {"name": "gqa"}, "position": {"name": "alibi"}}]


def sample_completions(
    decoder: Any, prompts: Any, seeds: Any, new_tokens: int, how: Any, ends: Any, together: bool = False
) -> Rollout:
    sampling = how if isinstance(how, Sampling) else Sampling(how)
    return Native().sample(decoder, Request(prompts, seeds, new_tokens, sampling, ends, together))


@pytest.mark.parametrize("decoder", ATTENTIONS, indirect=True)
def test_log_probability_of_sampling_is_that_of_training(decoder: Any) -> None:
    """Left-padded decoding with caches, packed training rows, and one plain forward pass for each row agree."""
    found = sample_completions(decoder, PROMPTS, [11, 12, 13], 9, 0.7, {1, 2, 3})
    mask = completion_mask(found)
    logp = score(decoder, found, 0.7).logp
    torch.testing.assert_close(logp * mask, padded(found.sampler), atol=1e-5, rtol=0)
    for i, (prompt, completion) in enumerate(zip(found.prompts, found.completions, strict=True)):
        logits = decoder(torch.tensor([[*prompt, *completion]]))[0, len(prompt) - 1 : -1] / 0.7
        plain = logits.log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(logp[i, : len(completion)], plain, atol=1e-5, rtol=0)
    assert not logp[~mask].any() and len({len(c) for c in found.completions}) > 1


def test_completion_ends_with_its_end_and_depends_on_its_seed_alone(decoder: Any) -> None:
    ends = {1, 2, 3}
    together = sample_completions(decoder, PROMPTS, [11, 12, 13], 30, 1.0, ends)
    for completion, ended in zip(together.completions, together.ended, strict=True):
        assert not ends & set(completion[:-1]) and ended == (completion[-1] in ends)
    alone = [sample_completions(decoder, [p], [s], 30, 1.0, ends) for p, s in zip(PROMPTS, (11, 12, 13), strict=True)]
    assert [a.completions[0] for a in alone] == together.completions
    other = sample_completions(decoder, PROMPTS, [14, 15, 16], 30, 1.0, ends)
    assert other.completions != together.completions


def test_limit_and_steps_to_it(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import blockwright.plugins.alignment.rollouts.engine.native as module

    steps: list[int] = []
    read = module.read
    monkeypatch.setattr(module, "read", lambda *a: steps.append(1) or read(*a))
    everything = set(range(16))
    assert sample_completions(decoder, PROMPTS, [1, 2, 3], 5, 1.0, everything).ended == [True] * 3
    assert len(steps) == 1
    sample_completions(decoder, PROMPTS, [1, 2, 3], 5, 1.0, everything, together=True)
    assert len(steps) == 6
    assert [len(c) for c in sample_completions(decoder, PROMPTS, [1, 2, 3], 5, 1.0, set()).completions] == [5] * 3


def test_prompt_is_read_once_and_ended_rows_leave(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import blockwright.plugins.alignment.rollouts.engine.native as module

    shapes: list[tuple[int, ...]] = []
    read = module.read
    monkeypatch.setattr(module, "read", lambda d, tokens, c: shapes.append(tuple(tokens.shape)) or read(d, tokens, c))
    seeds = list(range(24))
    found = sample_completions(decoder, PROMPTS, seeds, 12, 1.0, {1, 2, 3})
    assert shapes[0] == (3, 5) and shapes[1][1] == 1 and shapes[-1][0] < 12
    lengths = sorted((len(c) for c in found.completions), reverse=True)
    assert all(rows <= 24 and rows < 2 * sum(n > i for n in lengths) for i, (rows, _) in enumerate(shapes[1:], start=1))
    monkeypatch.undo()
    apart = sample_completions(decoder, [p for p in PROMPTS for _ in range(8)], seeds, 12, 1.0, {1, 2, 3})
    assert apart.completions == found.completions and apart.prompts == found.prompts
    for one, other in zip(apart.experts, found.experts, strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.9}])
def test_update_is_normalised_over_the_tokens_that_were_sampled_among(decoder: Any, how: dict[str, Any]) -> None:
    found = sample_completions(decoder, PROMPTS, range(12), 9, Sampling(0.9, **how), {1, 2})
    logp, mask = score(decoder, found, 0.9).logp, completion_mask(found)
    torch.testing.assert_close(logp * mask, padded(found.sampler), atol=1e-5, rtol=0)
    for completion, kept in zip(found.completions, found.kept, strict=True):
        assert set(enumerate(completion)) <= set(map(tuple, kept.T.tolist()))
        assert "top_k" not in how or torch.bincount(kept[0]).max() <= how["top_k"]
    everything = replace(found, kept=[])
    assert (score(decoder, everything, 0.9).logp - logp)[mask].min() < -0.02  # the mass of what was left out


def test_chunks_of_logits_change_neither_values_nor_gradients(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import blockwright.blocks.kernels.log_probabilities as module

    found = sample_completions(decoder.double(), PROMPTS, range(6), 9, Sampling(0.9, top_p=0.8), {1, 2})
    results = []
    for shape in ((1000, 16), (4, 16), (5, 7)):
        monkeypatch.setattr(module, "chunk_shape", lambda *_, shape=shape: shape)
        decoder.zero_grad()
        logp = score(decoder, found, 0.9).logp
        logp.square().sum().backward()
        results.append((logp.detach(), [p.grad.clone() for p in decoder.parameters() if p.grad is not None]))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-10, rtol=1e-8)


def test_replay_weighs_the_experts_of_the_rollout(tiny: Make, randomise: Make) -> None:
    """In bf16 sampling and training choose other experts for some tokens; replayed, for none, and the router learns."""
    model = tiny(
        moe=True,
        vocab_size=16,
        attention=MLA,
        ffn={"name": "moe", "n_experts": 16},
        gating={"name": "softmax_topk", "top_k": 4},
    )
    decoder = compose(model, seed=1)
    randomise(decoder, scale=2.0)
    exact, seeds = deepcopy(decoder).double().eval(), range(96)
    found = sample_completions(exact, PROMPTS, seeds, 9, 1.0, {1})
    scored = score(exact, found, 1.0, replay=True)
    assert not scored.rerouted and scored.routed == sum(len(e) for row in found.experts for e in row) > 0
    ratio = (scored.logp - padded(found.sampler)).exp()
    assert (ratio - 1).abs().max() < 1e-6
    decoder = decoder.eval().to(torch.bfloat16)
    found = sample_completions(decoder, PROMPTS, seeds, 9, 1.0, {1})
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


class Even(Reward):
    """1 for a completion of an even number of characters: learnable at once."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [float(len(text) % 2 == 0) for text in completions]


class Shuffled(Reward):
    """Those of ``Even``, each given to another completion."""

    said: ClassVar[list[float]] = []

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        true = [float(len(text) % 2 == 0) for text in completions]
        self.said.append(sum(true) / len(true))
        order = torch.randperm(len(true), generator=torch.Generator().manual_seed(len(self.said))).tolist()
        return [true[i] for i in order]


class Seldom(Reward):
    """1 for a completion that holds the digit 7 twice: groups without any are frequent."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [float(text.count("7") > 1) for text in completions]


class Constantly(Reward):
    """The same for all."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return [0.5] * len(completions)


class Reluctant(Reward):
    """1 for an odd number of characters; no opinion of an even one, and no number for one with a 7."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[Any]:
        return [10**400 if "7" in text else 1 if len(text) % 2 else None for text in completions]


class Failing(Reward):
    """Raises."""

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        raise RuntimeError("no judge")


@pytest.fixture(autouse=True)
def rewards(temporary_blocks: None) -> None:
    for name, cls in (
        ("even", Even),
        ("permuted", Shuffled),
        ("seldom", Seldom),
        ("constantly", Constantly),
        ("failing", Failing),
        ("reluctant", Reluctant),
    ):
        registry.register("reward", name)(cls)


class Watch(L.Callback):
    """The weights after every step, and what was logged last."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, *_: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in task.model.parameters()]))


@pytest.fixture
def train(tiny: Make, tmp_path: Path) -> Make:
    def run(
        steps: int = 2,
        updates: int = 1,
        ckpt_path: Path | None = None,
        callbacks: Any = (),
        accumulate: int = 1,
        model: Any = None,
        data: Any = None,
        validate: int = 0,
        precision: Any = "32-true",
        **task: Any,
    ) -> tuple[Grpo, Watch, L.Trainer]:
        made = built.task(
            "grpo",
            model or tiny(moe=True, vocab_size=16, attention=MLA, init={"std": 0.3}),
            AdamW(lr=3e-3, weight_decay=0.0),
            Constant(warmup=1),
            **{"reward": "even", "group_size": 4, "max_new_tokens": 6, **task},
        )
        module = data or built.data(
            "prompts",
            corpus=Sorting(train=40, held_out=4, salt=1),
            tokenizer=Chars(16),
            sequence_length=12,
            batch_size=4,
            updates=updates,
            cache_dir=str(tmp_path / "cache"),
        )
        watch = Watch()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = L.Trainer(
            **quiet,
            accelerator="cpu",
            precision=precision,
            max_steps=steps,
            max_epochs=-1,
            log_every_n_steps=1,
            limit_val_batches=validate,
            num_sanity_val_steps=0,
            val_check_interval=steps if validate else None,
            check_val_every_n_epoch=None if validate else 1,
            accumulate_grad_batches=accumulate,
            enable_model_summary=False,
            callbacks=[watch, *callbacks],
            use_distributed_sampler=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(made, module, ckpt_path=ckpt_path, weights_only=True)
        return made, watch, trainer

    return run


def test_update_raises_what_was_good_and_lowers_what_was_bad(train: Make) -> None:
    kept: list[Any] = []

    class Before(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, task: Any) -> None:
            found = next(iter(task.rollouts.whole.values()))
            with torch.no_grad():
                kept.append((found, score(task.model.eval(), found, 1.0).logp))
            task.model.train()

    task, _, trainer = train(1, callbacks=[Before()])
    found, before = kept[0]
    with torch.no_grad():
        change = ((score(task.model.eval(), found, 1.0).logp - before) * completion_mask(found)).sum(1)
    advantage = torch.tensor(found.advantage)
    assert (advantage > 0).any() and (advantage < 0).any()
    assert change[advantage > 0].mean() > 0 > change[advantage < 0].mean()
    figures = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
    names = ("reward", "reward_std", "zero_spread", "length", "truncated", "entropy", "clip_low", "clip_high")
    assert {f"train/{name}" for name in names} <= set(figures)
    assert figures["train/reward"] == pytest.approx(
        sum(len(task.data.tokenizer.decode(c)) % 2 == 0 for c in found.completions) / len(found)
    )
    assert figures["train/sampler_gap"] < 1e-5


@pytest.mark.slow
def test_shuffled_reward_raises_nothing(train: Make) -> None:
    Shuffled.said.clear()
    train(16, reward="permuted", group_size=16)
    shuffled, true = Shuffled.said, train(16, reward="even", group_size=16)[2].callback_metrics["train/reward"]
    assert abs(sum(shuffled[-4:]) - sum(shuffled[:4])) / 4 < 0.12 and true > shuffled[0] + 0.3


def test_reward_without_spread_and_failing_reward_change_nothing(train: Make) -> None:
    for reward in ("constantly", "failing"):
        if reward == "failing":
            with pytest.warns(
                UserWarning, match="the reward failing failed for 16 of 16 completions: RuntimeError: no judge"
            ):
                task, _, trainer = train(1, reward=reward, resamples=2)
            assert trainer.callback_metrics["train/reward_failures"] == 3  # groups without spread are judged again
            assert trainer.callback_metrics["train/reward"].isnan() and trainer.callback_metrics["train/judged"] == 0
        else:
            task, _, trainer = train(1, reward=reward)
        # Balance losses alone move routers, and what leads to them.
        head = task.model.output_weight
        assert task.rollouts.whole and not any(next(iter(task.rollouts.whole.values())).advantage)
        assert head.grad is None or not head.grad.any()


def test_figures_are_of_the_completions_that_have_a_reward(train: Make) -> None:
    """In training and on held-out prompts; what has none counts as no 0, and failures are a figure."""
    rollouts: list[Any] = []

    class Keep(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, task: Any) -> None:
            rollouts.append(next(iter(task.rollouts.whole.values())))

    with pytest.warns(UserWarning, match="the reward reluctant failed for .* gave a int that is no finite number"):
        task, _, trainer = train(1, reward="reluctant", callbacks=[Keep()], validate=1)
    figures = {k: float(v) for k, v in trainer.callback_metrics.items()}
    texts = [task.data.tokenizer.decode(c) for c in rollouts[0].completions]
    judged = [len(text) % 2 == 1 and "7" not in text for text in texts]
    failed = ["7" in text for text in texts]
    assert 0 < sum(judged) < len(texts) and any(failed)
    assert figures["train/reward"] == 1 and figures["train/judged"] == pytest.approx(sum(judged) / len(texts))
    assert figures["train/reward_failures"] == pytest.approx(sum(failed) / len(texts))
    assert figures["train/zero_spread"] == 1 and not any(rollouts[0].advantage)  # all that is judged is equal
    assert figures["val/reward"] == figures["val/greedy"] == 1 and 0 < figures["val/judged"] < 1
    assert 0 < figures["val/reward_failures"] < 1
    assert {reward for _, _, reward in task.held_out.samples} == {1.0, None}


def test_groups_without_spread_are_replaced(train: Make) -> None:
    """By groups of other prompts, as often as is allowed; what still has none stays, and all of it is counted."""
    rollouts: dict[int, list[Any]] = {}
    for resamples in (0, 6):
        found = rollouts[resamples] = []

        class Keep(L.Callback):
            def on_after_backward(self, trainer: L.Trainer, task: Any, found: list[Any] = found) -> None:
                found.append(next(iter(task.rollouts.whole.values())))

        train(1, reward="seldom", resamples=resamples, callbacks=[Keep()])
    groups = {n: torch.tensor(r.advantage).view(4, 4).ne(0).any(1) for n, (r,) in rollouts.items()}
    figures = {n: r.figures for n, (r,) in rollouts.items()}
    flat = [int((~g).sum()) for g in groups.values()]
    assert flat[0] >= 2 and flat[0] > flat[1]
    for n in (0, 6):
        assert figures[n]["zero_spread"] == 4 * (~groups[n]).sum()
        assert figures[n]["replaced"] == (0 if n == 0 else 4 * flat[0])
    first, last = rollouts[0][0], rollouts[6][0]
    for group, spread in enumerate(groups[0].tolist()):
        rows = slice(4 * group, 4 * group + 4)
        assert (first.completions[rows] == last.completions[rows]) == spread
        assert len({tuple(p) for p in last.prompts[rows]}) == 1
    lengths = [len(p) + len(c) - 1 for p, c in zip(last.prompts, last.completions, strict=True)]
    assert [len(row[0]) for row in last.experts] == lengths  # all that belongs to a completion was replaced


@pytest.mark.slow
def test_run_resumed_between_the_updates_of_a_rollout_equals_the_uninterrupted_one(train: Make, tmp_path: Path) -> None:
    settings = {"updates": 2, "surrogate": {"name": "clip", "high": 0.28}, "correction": "truncate"}
    _, whole, _ = train(4, **settings)
    _, _, trainer = train(3, **settings)
    trainer.save_checkpoint(tmp_path / "stop.ckpt")
    _, rest, _ = train(4, ckpt_path=tmp_path / "stop.ckpt", **settings)
    assert torch.equal(whole.weights[3], rest.weights[0]) and len(rest.weights) == 1


def test_text_is_sampled_while_a_step_is_prepared_and_never_while_it_is_counted(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []
    sampled: list[list[str]] = []

    def watched(name: str) -> None:
        method = getattr(Grpo, name)

        def call(self: Grpo, batch: Any, *rest: Any) -> Any:
            inside.append(name)
            try:
                return method(self, batch, *rest)
            finally:
                inside.pop()

        monkeypatch.setattr(Grpo, name, call)

    sample = Grpo._sample
    monkeypatch.setattr(Grpo, "_sample", lambda self, *rest: (sampled.append([*inside]), sample(self, *rest))[1])
    for name in ("prepare", "counts", "objective", "tokens_of"):
        watched(name)
    train(2)
    assert sampled == [["prepare"], ["prepare"]]


def test_updates_of_a_rollout_take_each_completion_once(train: Make) -> None:
    seen: list[Any] = []

    class Parts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
            number = int(batch["rollout"][0])
            part, whole = task.rollout_of(batch), task.rollouts.whole[number]
            seen.append((number, len(part), sorted(map(tuple, whole.completions)), part.completions))

    train(4, updates=2, callbacks=[Parts()])
    assert [number for number, *_ in seen] == [0, 0, 1, 1] and all(n == 8 for _, n, _, _ in seen)
    for (_, _, whole, a), (_, _, _, b) in (seen[:2], seen[2:]):
        assert sorted(map(tuple, [*a, *b])) == whole
    assert seen[0][2] != seen[2][2]


def test_ratio_of_a_first_update_is_1(train: Make) -> None:
    """With MLA, experts that are replayed, and several updates of a rollout, whose first changes the weights."""
    away: list[float] = []

    class Ratios(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, task: Any) -> None:
            rollout, logp = task._updated
            ratio = ((logp - padded(rollout.old)) * completion_mask(rollout)).exp()
            away.append(float((ratio - 1).abs().max()))

    trainer = train(4, updates=2, replay=True, callbacks=[Ratios()], precision="bf16-mixed")[2]
    assert away[0] == away[2] == 0  # the same computation, bit-identical
    assert min(away[1], away[3]) > 1e-3
    assert trainer.callback_metrics["train/rerouted"] == 0


@pytest.mark.slow
def test_penalty_pulls_towards_the_reference(train: Make, tmp_path: Path) -> None:
    _, _, trainer = train(1)
    trainer.save_checkpoint(tmp_path / "start.ckpt")
    start = {"init_from": str(tmp_path / "start.ckpt"), "reference": str(tmp_path / "start.ckpt")}
    first, _, trainer = train(1, penalty={"name": "k3", "beta": 0.5}, **start)
    assert trainer.callback_metrics["train/kl"] == pytest.approx(0, abs=1e-6)  # the policy is the reference
    kl = [train(6, penalty={"name": "k3", "beta": beta}, **start)[2].callback_metrics["train/kl"] for beta in (1e-6, 3)]
    assert kl[0] > 2 * kl[1] > 0
    assert not any(name.startswith("_held") for name, _ in first.named_parameters())


@pytest.mark.slow
def test_penalty_of_an_adapter_compares_with_the_model_without_it(train: Make) -> None:
    """In no further memory: the KL is 0 while the adapter is new, and that of a second model afterwards."""
    how = {"penalty": {"name": "k3", "beta": 0.5}, "starts": [Lora(["attention"], rank=2)]}
    first, _, trainer = train(1, **how)
    assert trainer.callback_metrics["train/kl"] == pytest.approx(0, abs=1e-9) and not first._reference_model
    later, _, trainer = train(4, **how)
    assert trainer.callback_metrics["train/kl"] > 1e-6
    base = compose(later.model_config)
    base.load_state_dict({name: t for name, t in later.model.state_dict().items() if not is_adapter(name)})
    rollout = later.rollouts.whole[max(later.rollouts.whole)]
    reference = later._reference_logp(rollout)
    assert torch.equal(reference, score(base, rollout, 1.0).logp)
    assert not torch.equal(reference, score(later.model, rollout, 1.0).logp)


@pytest.mark.parametrize("objective", [{"surrogate": "cispo"}, {"ratio": "sequence", "average": "constant"}])
def test_objectives_train(train: Make, objective: dict[str, Any]) -> None:
    _, watch, _ = train(2, updates=2, **objective)
    assert watch.weights[-1].isfinite().all() and not torch.equal(*watch.weights[-2:])


def test_accumulated_micro_batches_count_together(train: Make) -> None:
    """The step's denominator holds the completions of both micro-batches, whose rollouts come before the first."""
    totals: list[Any] = []

    class Totals(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, task: Any) -> None:
            totals.append((float(task.step._totals["completions"]), sorted(task.rollouts.whole)))

    train(1, accumulate=2, callbacks=[Totals()])
    assert totals == [(32.0, [0, 1]), (32.0, [0, 1])]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"group_size": 1}, "task.group_size", "at least 2"),
    ({"temperature": 0.0}, "task.temperature", "above 0"),
    ({"top_p": 0.0}, "task.top_p", "above 0"),
    ({"penalty": "k3"}, "task.reference", "none is named"),
    ({"penalty": "k3", "reference": "nowhere"}, "task.reference", "no such file or folder"),
    (
        {"reward": {"name": "exact_match", "answer": "solution"}},
        "task.reward",
        "'solution', which 48 of 48 records lack",
    ),
    ({"reward": "exact"}, "task.reward.name", "no reward is registered"),
    ({"surrogate": {"name": "clip", "lo": 0.1}}, "task.surrogate.lo", "has no parameter"),
    ({"updates": 3}, "data.updates", "must divide the 16 completions"),
    ({"updates": 2, "accumulate": 2}, "data.updates", "accumulated into one"),
]


@pytest.mark.parametrize(("settings", "path", "rule"), REFUSED)
def test_what_cannot_work_is_refused(train: Make, settings: dict[str, Any], path: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as refusal:
        train(1, **settings)
    assert refusal.value.path == path


def test_completion_longer_than_the_positions_is_refused(train: Make, tiny: Make) -> None:
    model = tiny(vocab_size=16, position={"name": "learned"})
    with pytest.raises(ConfigError, match="positions for 64") as refusal:
        train(1, model=model, max_new_tokens=60)
    assert refusal.value.path == "task.max_new_tokens"


def test_sampler_and_update_rotate_alike_or_are_refused(train: Make, tiny: Make) -> None:
    """LongRoPE's length of a sampler is the room of its caches, and of an update the longest sequence of its rows."""
    longrope = {"name": "longrope", "original_positions": 8}
    with pytest.raises(ConfigError, match="as short ones or as long") as refusal:
        train(1, model=tiny(vocab_size=16, position=longrope))
    assert refusal.value.path == "model.position.length"
    figures = train(1, model=tiny(vocab_size=16, position={**longrope, "length": 64}))[2].callback_metrics
    assert figures["train/sampler_gap"] < 1e-5


@pytest.mark.parametrize("gating", ["expert_choice", "sinkhorn"])
def test_gate_that_looks_across_the_batch_is_refused(train: Make, tiny: Make, gating: str) -> None:
    model = tiny(moe=True, vocab_size=16)
    model["gating"] = {"name": gating}
    with pytest.raises(ConfigError, match="looks at all tokens of a batch"):
        train(1, model=model)
