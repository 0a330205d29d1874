"""The task: what its loss is a mean of, when a balancing bias moves, and that what is logged is what was seen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.schedulers import Constant, WarmupCosine, WarmupStableDecay, WarmupStepDecay
from blockwright.training.starts import freeze
from blockwright.training.tasks.causal_lm import CausalLM
from blockwright.training.tasks.making import Setup
from blockwright.training.tasks.routing import balance_losses, gates_of
from tests.training.parallel.quiet import quiet_trainer

Batch = dict[str, Tensor]
BIASED = {"name": "sigmoid_bias", "top_k": 2, "bias_step": 0.125, "balance": {"name": "expert", "alpha": 0.01}}


def batch(seed: int, rows: int = 2, length: int = 12, masked: int = 3, packed: bool = True) -> Batch:
    """Random tokens; the last targets of the first row are not scored; rows hold two documents each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (rows, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, length - masked :] = -100
    places = torch.arange(length).expand(rows, -1)
    made = {"tokens": tokens[:, :-1], "targets": targets, "positions": places, "n_bytes": torch.full((rows,), length)}
    if packed:
        second = places >= 5
        made |= {"segments": second.long(), "positions": torch.where(second, places - 5, places)}
    return made


@pytest.fixture
def make_task(tiny: Callable[..., dict[str, Any]]) -> Callable[..., CausalLM]:
    def make(moe: bool = False, lr: float = 0.01, seed: int = 0, scheduler: Any = None, **changes: Any) -> CausalLM:
        return CausalLM(Setup(tiny(moe, **changes), AdamW(lr=lr), scheduler or Constant(1), seed))

    return make


def train(task, batches, folder, *, callbacks=(), val=(), **settings):
    usual = {"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    trainer = quiet_trainer(**{**usual, **settings}, default_root_dir=folder, callbacks=list(callbacks))
    loaders = [DataLoader(list(each), batch_size=None) for each in (batches, val) if each]
    trainer.fit(task, *loaders)
    return trainer


class Watch(L.Callback):
    """What each step returned and logged, and the balancing bias after each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []
        self.biases: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        self.logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.biases += [b.clone() for name, b in pl_module.named_buffers() if name.endswith("gating.bias")]


def by_hand(model: dict[str, Any], given: Batch, seed: int = 0) -> tuple[float, float]:
    """Mean over scored tokens, and the balance losses, of the freshly composed model."""
    decoder = compose(model, seed=seed)
    hidden, routings = decoder.hidden(given["tokens"], given["positions"], given.get("segments"))
    logits = F.linear(hidden, decoder.output_weight).flatten(0, 1)
    loss = F.cross_entropy(logits, given["targets"].flatten(), ignore_index=-100)
    balance = sum(float(v.detach()) for routing in routings if routing is not None for v in routing.losses.values())
    return float(loss.detach()), balance


# The loss


@pytest.mark.parametrize(("moe", "packed"), [(False, False), (True, True)], ids=["dense", "experts, packed"])
def test_loss_is_the_mean_over_scored_tokens_plus_the_balance(make_task, tmp_path, moe, packed):
    task, given, watch = make_task(moe), batch(1, packed=packed), Watch()
    trainer = train(task, [given], tmp_path, callbacks=[watch])
    loss, balance = by_hand(task.model_config, given)
    assert watch.losses == pytest.approx([loss + balance], rel=1e-5)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(loss, rel=1e-5)
    assert (balance > 0) == moe
    if moe:
        assert float(trainer.callback_metrics["train/expert_balance"]) == pytest.approx(balance, rel=1e-5)


@pytest.mark.parametrize("offset", [None, 3])
def test_positions_count_whether_or_not_there_are_segments(make_task, tmp_path, offset):
    task, given, watch = make_task(mtp={"depth": 1}), batch(1, packed=False), Watch()
    plain = {name: tensor for name, tensor in given.items() if name != "positions"}
    if offset is not None:
        given["positions"] = given["positions"] + offset * (torch.arange(12) > 5)
    asked = plain if offset is None else given
    trainer = train(task, [asked], tmp_path, callbacks=[watch])
    loss, _ = by_hand(task.model_config, given)
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(loss, rel=1e-6)
    decoder = compose(task.model_config, seed=0)
    hidden, _ = decoder.hidden(given["tokens"], given["positions"])
    ((nll, count),), _ = decoder.mtp_nll(hidden, given["tokens"], given["targets"], given["positions"])
    depth = task.model_config["mtp"]["loss_weight"] * float(nll / count)
    assert watch.losses == pytest.approx([loss + depth], rel=1e-6)


def test_z_loss_is_trained_on_and_logged_by_itself(make_task: Callable[..., CausalLM], tmp_path: Path) -> None:
    task, given, watch = make_task(), batch(1, packed=False), Watch()
    task.z_loss = 0.1
    decoder = compose(task.model_config, seed=0).requires_grad_(False)
    log_z = F.linear(decoder.hidden(given["tokens"])[0], decoder.output_weight).logsumexp(-1)
    expected = 0.1 * float(log_z[given["targets"] != -100].square().mean())
    logged = train(task, [given], tmp_path, callbacks=[watch]).callback_metrics
    loss, _ = by_hand(task.model_config, given)
    assert expected > 0.5
    assert watch.losses == pytest.approx([loss + expected], rel=1e-5)
    assert float(logged["train/logit_z"]) == pytest.approx(expected, rel=1e-5)
    assert float(logged["train/loss"]) == pytest.approx(loss, rel=1e-5)


def test_loss_has_multi_token_prediction_and_its_gates_are_balanced_too(make_task, tmp_path):
    mtp = {"depth": 2, "loss_weight": 0.5}
    task, given, watch = make_task(True, mtp=mtp, gating=BIASED), batch(1), Watch()
    trainer = train(task, [given], tmp_path, callbacks=[watch], val=[given])
    decoder = compose(task.model_config)
    hidden, routings = decoder.hidden(given["tokens"], given["positions"], given.get("segments"))
    further = decoder.mtp_nll(hidden, given["tokens"], given["targets"], given["positions"], given.get("segments"))
    mean = sum(float(nll / n) for nll, n in further[0]) / 2
    every = [r for r in (*routings, *further[1]) if r is not None]
    balance = sum(float(loss) for r in every for loss in r.losses.values())
    loss, _ = by_hand(task.model_config, given)
    assert watch.losses == pytest.approx([loss + 0.5 * mean + balance], rel=1e-5)
    assert watch.logged[0]["train/loss"] == pytest.approx(loss, rel=1e-5)  # of the text alone
    assert watch.logged[0]["train/mtp"] == pytest.approx(0.5 * mean, rel=1e-5)
    assert len(watch.biases) == 3 and all(b.abs().max() == 0.125 for b in watch.biases)
    shown = {k.split("/")[1] for k in trainer.callback_metrics if k.startswith("val_load/")}
    assert shown == {"layer1"}  # validation does not run what is taken off for inference


def test_logged_training_loss_is_the_mean_since_the_last_log_by_tokens(make_task, tmp_path):
    watch = Watch()
    batches = [batch(1, masked=0), batch(2, masked=11), batch(3, masked=2), batch(4)]
    task = make_task(lr=1e-9)  # so that the model stays what it was
    train(task, batches, tmp_path, callbacks=[watch], log_every_n_steps=2)
    losses = [by_hand(task.model_config, b)[0] for b in batches]
    counts = [int((b["targets"] != -100).sum()) for b in batches]
    for logged, pair in ((watch.logged[1], (0, 1)), (watch.logged[3], (2, 3))):
        nats, tokens = sum(losses[i] * counts[i] for i in pair), sum(counts[i] for i in pair)
        assert logged["train/loss"] == pytest.approx(nats / tokens, rel=1e-4)
        assert logged["train/bits_per_byte"] == pytest.approx(nats / 48 / 0.693147, rel=1e-4)
    assert "train/loss" not in watch.logged[0]


def test_validation_counts_every_token_of_all_batches_once(make_task: Callable[..., CausalLM], tmp_path: Path) -> None:
    val = [batch(5, masked=0), batch(6, masked=11)]
    task = make_task(moe=True, lr=1e-9)
    trainer = train(task, [batch(1)], tmp_path, val=val)
    losses = [by_hand(task.model_config, b)[0] for b in val]
    counts = [int((b["targets"] != -100).sum()) for b in val]
    mean = sum(loss * n for loss, n in zip(losses, counts, strict=True)) / sum(counts)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert metrics["val/loss"] == pytest.approx(mean, rel=1e-4)
    assert metrics["val/perplexity"] == pytest.approx(torch.tensor(mean).exp().item(), rel=1e-3)
    assert not any("val/expert_balance" in name for name in metrics)


@pytest.mark.slow
def test_loads_of_validation_and_of_training_are_kept_apart(make_task: Callable[..., CausalLM], tmp_path: Path) -> None:
    def loads(val: Sequence[Batch], **settings: Any) -> list[dict[str, float]]:
        watch, batches = Watch(), [batch(i) for i in range(4)]
        train(make_task(moe=True), batches, tmp_path, callbacks=[watch], val=val, log_every_n_steps=2, **settings)
        return [{k: v for k, v in each.items() if k.startswith("train")} for each in watch.logged]

    assert loads([batch(9), batch(10)], val_check_interval=1) == loads([])


def test_balance_loss_of_a_layer_of_which_nothing_is_trained_is_dropped(tiny: Callable[..., dict[str, Any]]) -> None:
    decoder = compose(tiny(True))
    routings = decoder.hidden(batch(0)["tokens"])[1]
    (name, whole), *others = balance_losses(routings, decoder).items()
    routing = [i for i, each in enumerate(routings) if each is not None]
    assert not others
    freeze(decoder, ["*.gating"])
    assert balance_losses(routings, decoder)[name] == whole  # what feeds a fixed gate still learns
    for layer in routing:
        freeze(decoder, [f"layers.{layer}"])
    assert balance_losses(routings, decoder) == {}


# The balancing bias


def loads_of(task: CausalLM) -> list[Tensor]:
    """Filled with the load of every micro-batch that the gate sees."""
    seen: list[Tensor] = []
    for gate in gates_of(task.model).values():
        gate.register_forward_hook(lambda module, inputs, routing: seen.append(routing.load.clone()))
    return seen


class Hooked(L.Callback):
    """Hooks the gates once the model is there."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = loads_of(pl_module)  # type: ignore[arg-type]


def test_balancing_bias_moves_once_a_step_by_the_load_of_all_micro_batches(make_task, tmp_path):
    watch, hooked = Watch(), Hooked()
    task = make_task(moe=True, gating=BIASED)
    train(task, [batch(i) for i in range(8)], tmp_path, callbacks=[watch, hooked], accumulate_grad_batches=4)
    assert len(watch.biases) == len(hooked.seen) == 8
    zero = torch.zeros(6)
    for i in (0, 1, 2):
        assert torch.equal(watch.biases[i], zero)
    first = sum(hooked.seen[:4], zero)
    assert first.sum() == 4 * 2 * 12 * 2  # micro-batches, rows, tokens, experts a token
    assert torch.equal(watch.biases[3], 0.125 * (first.mean() - first).sign())
    for i in (4, 5, 6):
        assert torch.equal(watch.biases[i], watch.biases[3])
    second = sum(hooked.seen[4:], zero)
    assert torch.equal(watch.biases[7], watch.biases[3] + 0.125 * (second.mean() - second).sign())
    assert watch.biases[3].abs().max() == 0.125
    alone = 0.125 * (hooked.seen[3].mean() - hooked.seen[3]).sign()
    assert not torch.equal(watch.biases[3], alone)  # or the last micro-batch alone would have passed


@pytest.mark.slow
@pytest.mark.parametrize("more", ["recomputed", "validated"])
def test_recomputing_and_validation_move_the_bias_no_further(make_task, tiny, tmp_path, more):
    plain, again = Watch(), Watch()
    batches, how = [batch(i) for i in range(8)], {"accumulate_grad_batches": 4}
    train(make_task(moe=True, gating=BIASED), batches, tmp_path, callbacks=[plain], **how)
    recompute = "full" if more == "recomputed" else "none"
    setup = Setup(tiny(True, gating=BIASED), AdamW(lr=0.01), Constant(1), 0, activation_checkpointing=recompute)
    val = {"val": [batch(7), batch(8)], "val_check_interval": 1} if more == "validated" else {}
    train(CausalLM(setup), batches, tmp_path, callbacks=[again], **how, **val)
    assert len(plain.biases) == 8 and plain.biases[-1].abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(plain.biases, again.biases, strict=True))
    assert plain.losses == again.losses
    if more == "recomputed":
        assert plain.logged == again.logged


# Everything else


def test_draws_of_a_step_depend_on_the_step_alone(make_task: Callable[..., CausalLM], tmp_path: Path) -> None:
    class Draws(L.Callback):
        def __init__(self, disturb: bool) -> None:
            self.drawn: list[float] = []
            self.disturb = disturb

        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
            self.drawn.append(torch.rand(()).item())
            if self.disturb:
                torch.rand(100)

    one, other, third = Draws(False), Draws(True), Draws(False)
    train(make_task(), [batch(1)] * 3, tmp_path, callbacks=[one])
    train(make_task(), [batch(1)] * 3, tmp_path, callbacks=[other])
    train(make_task(seed=1), [batch(1)] * 3, tmp_path, callbacks=[third])
    assert one.drawn == other.drawn and len(set(one.drawn)) == 3
    assert one.drawn != third.drawn


def test_training_without_an_end_needs_a_schedule_that_bears_it(make_task, tmp_path):
    endless = {"max_epochs": -1, "max_steps": -1, "max_time": {"seconds": 0}}
    train(make_task(), [batch(1)], tmp_path, **endless)
    with pytest.raises(ConfigError) as refused:
        train(make_task(scheduler=WarmupCosine()), [batch(1)], tmp_path, **endless)
    assert refused.value.path == "trainer.max_steps"


def test_training_that_is_all_warm_up_ends_or_is_refused(make_task: Callable[..., CausalLM], tmp_path: Path) -> None:
    ended = set()
    for kind in (Constant, WarmupCosine, WarmupStableDecay, WarmupStepDecay):
        task, watch = make_task(scheduler=kind(warmup=2)), Watch()
        with contextlib.suppress(ConfigError):  # some want room for more than the warm-up
            task.schedule.check(2)
            train(task, [batch(1)] * 3, tmp_path, callbacks=[watch], max_steps=2)
            assert len(watch.losses) == 2
            ended.add(kind)
    assert Constant in ended


def test_saved_hyperparameters_are_plain_types(make_task: Callable[..., CausalLM]) -> None:
    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(k, str) and plain(v) for k, v in value.items())
        return all(map(plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | type(None))

    hyperparameters = dict(make_task(moe=True).hparams)
    assert set(hyperparameters) == {"model", "seed"}
    assert plain(hyperparameters)


def test_model_is_built_once_and_not_before_it_is_asked_for(make_task: Callable[..., CausalLM]) -> None:
    task = make_task()
    assert task.decoder is None
    task.configure_model()
    built = task.decoder
    task.configure_model()
    assert task.decoder is built is not None


def test_prediction_is_the_likeliest_next_token(make_task: Callable[..., CausalLM]) -> None:
    task, given = make_task(), batch(1, packed=False)
    task.configure_model()
    with torch.no_grad():
        assert torch.equal(task.predict_step(given, 0), task.decoder(given["tokens"]).argmax(-1))  # type: ignore[misc]


@torch.no_grad()
def test_acceptance_of_each_depth_is_its_agreement_with_the_model(make_task, tmp_path):
    task, batches = make_task(mtp={"depth": 2}), [batch(1, packed=False), batch(2)]
    trainer = quiet_trainer(default_root_dir=tmp_path)
    (found,) = trainer.validate(task, DataLoader(batches, batch_size=None), verbose=False)
    right, of = [0, 0], [0, 0]
    for given in batches:
        tokens, segments = given["tokens"], given.get("segments")
        hidden, _ = task.model.hidden(tokens, given["positions"], segments)
        own = task.model.logits(hidden).argmax(-1)
        for k, (states, _) in enumerate(task.model.mtp_states(hidden, tokens, given["positions"], segments), start=1):
            drafts = task.model.logits(states).argmax(-1)
            for row in range(len(tokens)):
                for i in range(tokens.shape[1] - k):
                    same = segments is None or segments[row, i] == segments[row, i + k]
                    if same and given["targets"][row, i + k] != -100:
                        of[k - 1] += 1
                        right[k - 1] += int(drafts[row, i] == own[row, i + k])
    assert 0 < sum(right) < sum(of)
    for k in (1, 2):
        assert found[f"val/acceptance_{k}"] == pytest.approx(right[k - 1] / of[k - 1], rel=1e-6)
