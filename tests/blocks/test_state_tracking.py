"""What a recurrence can follow: states that a product of the tokens decides, which decays alone cannot hold.

Grazzi et al. 2024, arXiv 2411.12537: the parity of a sequence needs a transition with a negative or complex eigenvalue.
A delta rule whose erasing reaches 2 reflects, Mamba-3 turns; a delta rule that erases at most once, and Mamba-2, forget
or keep. Trained here on one layer, under a minute each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder

pytestmark = pytest.mark.slow

Task = Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]

STEPS, LENGTH, ROWS, RATE = 400, 32, 64, 3e-3
HEADS = {"n_heads": 2, "head_dim": 16, "taps": 1}
SPACE = {"n_heads": 4, "state_dim": 16}
REFLECTS = {"name": "gated_delta_2", **HEADS, "negative_eigenvalues": True}
TURNS = {"name": "mamba3", **SPACE, "least_step": 0.1, "most_step": 1.0, "rotated": 1.0}
ERASES = {"name": "gated_delta_2", **HEADS}
FORGETS = {"name": "mamba2", **SPACE}


def parity(rows: int, length: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bits, and whether the number of ones up to each is odd."""
    bits = torch.randint(2, (rows, length), generator=draws)
    return bits, bits.cumsum(1) % 2


def swaps(rows: int, length: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nothing, or a swap of the first or of the last two of three places, and how things stand after each: one of 6."""
    orders = list(itertools.permutations(range(3)))
    moves = [(0, 1, 2), (1, 0, 2), (0, 2, 1)]
    after = torch.tensor([[orders.index(tuple(order[i] for i in move)) for move in moves] for order in orders])
    chosen, states = torch.randint(3, (rows, length), generator=draws), [torch.zeros(rows, dtype=torch.long)]
    for t in range(length):
        states.append(after[states[-1], chosen[:, t]])
    return chosen, torch.stack(states[1:], 1)


def trained(attention: dict[str, Any], task: Task) -> Decoder:
    """One layer, trained on sequences that grow to ``LENGTH``."""
    around = {"position": "none", "norm": "rmsnorm", "residual": "prenorm", "ffn": {"name": "swiglu", "d_ff": 64}}
    sizes = {"vocab_size": 6, "d_model": 32, "n_layers": 1, "max_positions": 64}
    init = {"std": 0.1, "depth_scaled": False}
    decoder = compose({**sizes, **around, "attention": attention, "init": init}, seed=0)
    optimizer, draws = torch.optim.Adam(decoder.parameters()), torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)
        tokens, states = task(ROWS, 4 + int((LENGTH - 4) * min(1, 2 * step / STEPS)), draws)
        loss = F.cross_entropy(decoder(tokens).flatten(0, 1), states.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
    return decoder.eval()


@torch.no_grad()
def right_at_the_end(decoder: Decoder, task: Task) -> float:
    """Share of right answers for the last eight tokens of new sequences; chance is 1/2 for parity, 1/6 for swaps."""
    tokens, states = task(256, LENGTH, torch.Generator().manual_seed(1))
    return float((decoder(tokens).argmax(-1) == states)[:, -8:].float().mean())


def test_turns_follow_parity_and_decays_do_not() -> None:
    assert right_at_the_end(trained(TURNS, parity), parity) > 0.99
    assert right_at_the_end(trained(FORGETS, parity), parity) < 0.65


def test_only_reflections_follow_a_product_whose_order_matters() -> None:
    """Swaps of three places do not commute. Whether their number is odd is parity, which is followed with them."""
    assert right_at_the_end(trained(REFLECTS, swaps), swaps) > 0.99
    assert right_at_the_end(trained(ERASES, swaps), swaps) < 0.4
