"""Every block that is registered, chosen by the override that the command line takes, trains."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from pairwise import each

from blockwright import registry
from blockwright.blocks.compose import check, compose
from blockwright.training.configuration.composing import compose_config

INSIDE = ["+model.experts.experts={name: swiglu, d_ff: 32}"]
NEEDS = {  # parameters without a default, by kind or block
    "experts": ["model.experts.d_ff=32"],
    "experts/latent": INSIDE,
    "experts/with_identity": INSIDE,
    "experts/with_skip": INSIDE,
}
KINDS = ("attention", "position", "ffn", "gating", "experts", "norm", "residual")
ALONE = [(kind, name) for kind in KINDS for name in registry.names(kind)]


def takes_positions(attention: str) -> bool:
    """Recurrences and convolutions know the order of tokens without."""
    return "position" in registry.lookup("attention", attention).schema.parameters


class Losses(L.Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(outputs["loss"]))


def assert_learns(fit: Callable[..., L.Trainer], *overrides: str) -> L.LightningModule:
    losses = Losses()
    trainer = fit("trainer.max_steps=5", "scheduler=constant", "data.batch_size=4", *overrides, callbacks=[losses])
    assert len(losses.values) == 5
    assert losses.values[-1] < losses.values[0] - 0.3, losses.values
    return trainer.lightning_module


WITH_POSITIONS = [name for name in registry.names("attention") if takes_positions(name)]


CHOSEN = each(WITH_POSITIONS, registry.names("position"))


@pytest.mark.parametrize(
    ("attention", "position"), [*CHOSEN[:6], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in CHOSEN[6:])]
)
def test_any_attention_trains_with_any_position(
    tiny: Callable[..., dict[str, Any]], attention: str, position: str
) -> None:
    """By the composition alone: the next test takes each of them through the whole program."""
    decoder = compose(tiny(attention={"name": attention, "n_heads": 4}, position={"name": position}), seed=0)
    chosen = registry.lookup("position", position).cls
    assert all(type(layer.attention) is registry.lookup("attention", attention).cls for layer in decoder.layers)
    assert sum(isinstance(m, chosen) for m in decoder.layers.modules()) == 2 * (chosen.place == "attention")
    assert isinstance(decoder.position, chosen) or chosen.place == "attention"
    ids = torch.randint(61, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer, losses = torch.optim.AdamW(decoder.parameters(), lr=0.01), []
    for _ in range(5):
        loss = decoder.nll(decoder.hidden(ids[:, :-1])[0], ids[:, 1:]) / ids[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1, losses


WHOLE = [next(pair for pair in ALONE if pair[0] == kind) for kind in KINDS]
WHOLE += [tuple(known.split("/")) for known in NEEDS if "/" in known]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), WHOLE, ids=[f"{kind}-{name}" for kind, name in WHOLE])
def test_a_block_of_each_kind_trains_by_its_override(fit: Callable[..., L.Trainer], kind: str, name: str) -> None:
    """Through the whole program."""
    task = assert_learns(fit, f"model/{kind}={name}", *NEEDS.get(f"{kind}/{name}", NEEDS.get(kind, [])))
    assert any(isinstance(m, registry.lookup(kind, name).cls) for m in task.modules())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "gating", "experts"])
def test_a_block_is_chosen_by_its_override(kind: str) -> None:
    """Every name is an option by the same code (tests/registry/test_hydra.py), and composes (tests/test_presets.py)."""
    for name in (registry.names(kind)[1], registry.names(kind)[-1]):
        given = NEEDS.get(f"{kind}/{name}", NEEDS.get(kind, []))
        decoder = compose(check(compose_config([f"model/{kind}={name}", *given]).model), device="meta")
        assert any(isinstance(m, registry.lookup(kind, name).cls) for m in decoder.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.names("balance"))
def test_any_balance_trains_and_its_loss_is_logged(fit: Callable[..., L.Trainer], name: str) -> None:
    task = assert_learns(fit, f"model.gating.balance={{name: {name}}}")
    assert any(isinstance(m, registry.lookup("balance", name).cls) for m in task.modules())


@pytest.mark.slow
def test_swap_on_the_real_command_line(
    train_py: Callable[..., subprocess.CompletedProcess[str]], small: list[str], tmp_path: Path
) -> None:
    swap = ["model/attention=gqa", "model/position=alibi", "model/ffn=relu2", "model/norm=layernorm"]
    done = train_py(*small, *swap, f"hydra.run.dir={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "completed" and results["steps"] == 6
    assert results["metrics"]["val/loss"] < 5.2
    assert "Continue: blockwright train" in done.stdout
    assert "model/attention=gqa" in done.stdout.partition("Continue:")[2]
