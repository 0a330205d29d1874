"""Device-limited routing (DeepSeek-V2): tokens confined to M groups of experts, one a rank, travel M times at most."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
from counting import Counted
from many_ranks import DEEPSEEK, spawn, train

RANKS, WIDTH = 4, 32  # d_model
GATE = "{name: group_limited, n_groups: 4, top_groups: 2, top_k: 3, scaling: 2.0,"


class Step(L.Callback):
    """Counts the bytes of one step's all-to-all."""

    def __init__(self) -> None:
        self.counted = Counted()

    def on_train_batch_start(self, *_: Any) -> None:
        self.counted.__enter__()

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.counted.__exit__(None, None, None)


def limits() -> dict[int, int]:
    """M → bytes of this rank, of four experts a token among 1 … 4 of the 4 ranks."""
    assert GATE in DEEPSEEK
    found = {}
    for top_groups in (2, 4):
        gate = GATE.replace("top_groups: 2, top_k: 3", f"top_groups: {top_groups}, top_k: 4")
        step = Step()
        model = DEEPSEEK.replace(GATE, gate)
        train(model, strategy={"expert": RANKS}, devices=RANKS, steps=1, callbacks=[step])
        found[top_groups] = step.counted.bytes["all_to_all"]
    return found


@pytest.mark.slow
def test_fewer_groups_send_less() -> None:
    ranks = spawn(RANKS, limits)
    limited, free = (sum(rank[m] for rank in ranks) for m in (2, 4))
    tokens, layers, passes = 8 * 12, 2, 4  # rows to the experts and back, forward and backward
    note = 1 + 2 * 2 / WIDTH / 2  # beside a row, there and in its gradient, number and weight of up to 2 experts
    assert 0 < limited <= 2 * note * passes * layers * tokens * WIDTH * 4  # no more than M copies of a token
    assert limited < 0.8 * free
