"""Every block that is registered, chosen by the override that the command line takes, trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from pairwise import each

from blockwright import registry
from blockwright.blocks.compose import compose

INSIDE = ["+model.experts.experts={name: swiglu, d_ff: 32}"]
NEEDS = {  # parameters without a default, by kind or block
    "experts": ["model.experts.d_ff=32"],
    "experts/latent": INSIDE,
    "experts/with_identity": INSIDE,
    "experts/with_skip": INSIDE,
}
KINDS = ("attention", "position", "ffn", "gating", "experts", "norm", "residual")
# Recurrences and convolutions know the order of tokens without a position.
WITH_POSITIONS = [
    name for name in registry.names("attention") if "position" in registry.lookup("attention", name).schema.parameters
]
CHOSEN = each(WITH_POSITIONS, registry.names("position"))
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("attention", "position"), [*CHOSEN[:4], *(pytest.param(*pair, marks=SLOW) for pair in CHOSEN[4:])]
)
def test_any_attention_trains_with_any_position(tiny: Any, attention: str, position: str) -> None:
    """By the composition alone: the next test takes each kind through the whole program."""
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


class Losses(L.Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


WHOLE = [(kind, registry.names(kind)[0]) for kind in KINDS]
WHOLE += [tuple(known.split("/")) for known in NEEDS if "/" in known]
BALANCES = [("balance", name) for name in registry.names("balance")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [*WHOLE, *BALANCES], ids="-".join)
def test_a_block_of_each_kind_trains_by_its_override(fit: Callable[..., L.Trainer], kind: str, name: str) -> None:
    """Through the whole program."""
    swap = f"model/{kind}={name}" if kind != "balance" else f"model.gating.balance={{name: {name}}}"
    losses, given = Losses(), NEEDS.get(f"{kind}/{name}", NEEDS.get(kind, []))
    quick = ("trainer.max_steps=5", "scheduler=constant", "data.batch_size=4")
    trainer = fit(*quick, swap, *given, callbacks=[losses])
    assert len(losses.values) == 5 and losses.values[-1] < losses.values[0] - 0.3, losses.values
    assert any(isinstance(m, registry.lookup(kind, name).cls) for m in trainer.lightning_module.modules())
