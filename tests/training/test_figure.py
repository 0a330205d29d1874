"""A figure and its direction: names, what contradicts it, and callbacks that act on it in a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf

from blockwright.registry import ConfigError, RegistrationError
from blockwright.training.callbacks.interruption import EarlyStopping
from blockwright.training.checkpoints.saving import Keeper
from blockwright.training.configuration import figures
from blockwright.training.configuration.composing import compose_config
from blockwright.training.figure import (
    TRAIN,
    Figure,
    better_of,
    by_name,
    declared,
    find,
    names_in,
    read_records,
    refuse_contradictions,
)
from blockwright.training.tasks.causal_lm import CausalLM


def test_word_in_braces_stands_for_one_part_of_a_name() -> None:
    figure = Figure("layer{layer}/entropy", "of ln E", "more", ("val_load", "test_load"))
    assert figure.stands_for("val_load/layer12/entropy") and figure.stands_for("test_load/layer0/entropy")
    others = ("train_load/layer1/entropy", "val_load/layer/entropy", "val_load/layer1/2/entropy", "val_load/layer1/x")
    assert not any(map(figure.stands_for, others))


def test_first_that_fits_counts_and_a_direction_that_is_none_is_refused() -> None:
    figures = (Figure("reward_std", "", None, TRAIN), Figure("reward_{part}", "", "more", TRAIN))
    better = [found.better for name in ("std", "length") if (found := find(f"train/reward_{name}", figures))]
    assert better == [None, "more"] and find("train/load", figures) is None
    assert names_in("train", figures) == ("reward_std", "reward_{part}")
    with pytest.raises(RegistrationError):
        Figure("f1", "", "max")  # type: ignore[arg-type]


def test_results_give_back_what_was_declared() -> None:
    logged = {"val/loss": 1.0, "val/accuracy": 0.5, "train/lr": 0.1, "val/own": 1.0}
    figures = (
        Figure("loss", "nats per pair", "less"),
        Figure("accuracy", "of pairs", "more"),
        Figure("lr", "", None, TRAIN),
    )
    back = read_records({"figures": {n: f.to_plain() for n, f in by_name(logged, figures).items()}})
    of_loss, of_accuracy = ("nats per pair", "less"), ("of pairs", "more")
    found = {name: (f.unit, f.better) for name, f in back.items()}
    assert found == {"val/loss": of_loss, "val/accuracy": of_accuracy, "train/lr": ("", None)}


LOSS, COUNT = Figure("loss", "nats per token", "less"), Figure("length", "tokens", None, TRAIN)


REFUSED: list[Any] = [
    (LOSS, [("direction", "maximize")], "direction"),
    (LOSS, [("mode", "max")], "mode"),
    (LOSS, [("direction", None), ("sweeper", "maximize")], "sweeper"),
    (LOSS, [("direction", "minimise")], "direction"),
    (COUNT, [("direction", "minimize")], "metric"),  # neither better nor worse where it is more
    (None, [("a.mode", None)], "metric"),  # which way is better is not known
    (None, [("direction", None)], "metric"),
    (None, [("a", "minimize"), ("b", "maximize")], "a"),
    (None, [("a", ["minimize"])], "a"),
]


def test_direction_follows_from_the_figure_or_what_is_asked_and_contradiction_and_doubt_are_refused() -> None:
    assert better_of("metric", "x/y", LOSS) == "less"
    assert better_of("metric", "x/y", LOSS, ("d", "minimize"), ("m", "min")) == "less"
    assert better_of("metric", "x/y", None, ("d", "maximize")) == "more"
    for figure, asked, path in REFUSED:
        with pytest.raises(ConfigError) as caught:
            better_of("metric", "x/y", figure, *asked)
        assert caught.value.path == path


# --- callbacks --------------------------------------------------------------------------------------------------------


class Right(L.Callback):
    """Logs a share of right answers that falls, and one that nothing declares; also a target of a configuration."""

    figures = (Figure("right", "of answers", "more"), Figure("answers", "", None))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        share = 1 / (1 + trainer.global_step)
        pl_module.log_dict({"val/right": share, "val/answers": 7.0, "val/odd": share})


EACH: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 1, "num_sanity_val_steps": 0, "max_steps": 6}


@pytest.mark.slow
def test_callbacks_act_in_the_direction_of_their_figures(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    """The best is of most answers right, and of least loss; training stops where no more are right."""
    monitors = ("val/right", "val/loss")
    kept = {monitor: Keeper(tmp_path / monitor[4:], filename="best", monitor=monitor) for monitor in monitors}
    odd = Keeper(tmp_path / "odd", filename="best", monitor="val/odd", mode="max")
    stop = EarlyStopping("val/right", patience=2)
    trainer = fit(callbacks=[Right(), odd, stop, *kept.values()], enable_checkpointing=True, **EACH)
    assert float(kept["val/right"].best_model_score) == float(odd.best_model_score) == 0.5  # of the first step
    assert kept["val/right"].mode == odd.mode == "max" and kept["val/loss"].mode == "min"
    assert torch.load(tmp_path / "right" / "best.ckpt", weights_only=True)["global_step"] == 1
    assert trainer.global_step == 3 and float(stop.best_score) == 0.5 and stop.wait_count == 2
    term = find("train/expert_balance", declared(trainer.lightning_module))  # declared by being one of the loss
    assert term is not None and term.better == "less"
    assert find("train/expert_balance", declared(CausalLM)) is None


WRONG: dict[str, tuple[str, Callable[[], Any]]] = {
    "against more": ("callbacks.early_stopping.mode", lambda: EarlyStopping("val/right", mode="min")),
    "neither": ("callbacks.early_stopping.monitor", lambda: EarlyStopping("val/answers")),
    "not known": ("callbacks.early_stopping.monitor", lambda: EarlyStopping("val/odd")),
    "against less": ("callbacks.checkpoint.mode", lambda: Keeper(monitor="val/loss", mode="max")),
    "no direction of the best": ("callbacks.checkpoint.monitor", lambda: Keeper(monitor="val/odd")),
    "Lightning's default": ("EarlyStopping.mode", lambda: LightningEarlyStopping("val/right")),
    "Lightning's": ("ModelCheckpoint.mode", lambda: ModelCheckpoint(monitor="val/loss", mode="max")),
}


@pytest.mark.parametrize("name", WRONG)
def test_callback_that_would_act_in_the_wrong_direction_is_refused(name: str) -> None:
    """However it was made: in Python, by the Lightning CLI or by Hydra."""
    path, callback = WRONG[name]
    trainer: Any = SimpleNamespace(lightning_module=CausalLM, callbacks=[Right(), made := callback()])
    with pytest.raises(ConfigError) as caught:
        made.setup(trainer, CausalLM, "fit") if hasattr(made, "asked_mode") else refuse_contradictions(trainer)
    assert caught.value.path == path


LIGHTNING = "lightning.pytorch.callbacks.EarlyStopping"  # whose mode is min, if nothing is said
RIGHT = f"+callbacks.right._target_={__name__}.Right"


STOP = [f"+callbacks.stop._target_={LIGHTNING}", "+callbacks.stop.monitor=val/right", RIGHT]


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["direction=maximize"], "direction"),
        (["callbacks.checkpoint.mode=max"], "callbacks.checkpoint.mode"),
        (["optimized_metric=val/right", "direction=minimize", RIGHT], "direction"),
        (STOP, "callbacks.stop.mode"),
    ],
)
def test_configuration_in_the_wrong_direction_is_refused(overrides: list[str], path: str, composed: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        figures.check(changed(composed, overrides))
    assert caught.value.path == path


def changed(composed: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The configuration with overrides of its values, as Hydra would make it."""
    given = OmegaConf.from_dotlist([each.lstrip("+") for each in overrides])
    plain: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(composed), given), resolve=True)
    return plain


@pytest.fixture(scope="module")
def composed(small: list[str]) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(compose_config(small, output_dir="x"), resolve=True)
    return plain


def test_direction_of_a_sweep_is_that_of_its_figure(composed: dict[str, Any]) -> None:
    def of(*overrides: str) -> str:
        return figures.check_composed(OmegaConf.create(changed(composed, list(overrides))))

    assert of() == "minimize" and of("optimized_metric=val/right", RIGHT) == "maximize"
    assert of("optimized_metric=speed/tokens_per_second") == "maximize"
    assert of("optimized_metric=val/own", "direction=maximize") == "maximize"
    with pytest.raises(ConfigError, match="which way is better is not known"):
        of("optimized_metric=val/own")
    older = {key: value for key, value in composed.items() if key != "direction"}
    assert figures.check_composed(OmegaConf.create(older)) == "minimize"


def test_checks_before_a_run_include_those_of_directions(checked: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="contradicts val/loss, of which less is better"):
        checked("callbacks.checkpoint.mode=max")
