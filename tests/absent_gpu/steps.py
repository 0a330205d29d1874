"""Steps of a decoder on tensors without memory: of training under bf16 autocast, and of decoding in bf16."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from blockwright import registry
from blockwright.blocks.compose import assemble, check
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.flex import flex_causal_attention
from blockwright.blocks.kernels.scoring import Band, Scoring, Slopes
from blockwright.registry.layout import plan
from tests.absent_gpu.cases import Attention
from tests.absent_gpu.operations import Operations

BATCH, LENGTH = 2, 2048
# One for the whole process: kernels keep masks between calls, and tensors of two modes do not mix.
MODE = FakeTensorMode()
copyreg.pickle(FakeTensorMode, lambda mode: "MODE")  # a copy of a module stays in it


def step(config: dict[str, Any], packed: bool, prepare: Callable[[Decoder], Any] = lambda _: None) -> int:
    """Forward, loss and backward of one layer of each kind that a composition has; returns the operators called."""
    with MODE:
        decoder = layers_of(config)
        prepare(decoder)
        tokens = torch.randint(decoder.config["vocab_size"], (BATCH, LENGTH), device="cuda")
        segments = torch.zeros_like(tokens) if packed else None
        with Operations() as called:
            with torch.autocast("cuda", torch.bfloat16):
                loss = _loss(decoder, tokens, segments)
            loss.backward()
    unread = tuple(f"{kind}." for kind in decoder.inputs)  # these tokens stand for no picture
    trained = [(name, p) for name, p in decoder.named_parameters() if p.requires_grad and not name.startswith(unread)]
    without = [name for name, p in trained if p.grad is None]
    if without:
        raise AssertionError(f"no gradient reaches {', '.join(without)}")
    return called.count


def decode(config: dict[str, Any], prepare: Callable[[Decoder], Any] = lambda _: None) -> int:
    """One token after a prompt, with caches, in bf16; returns the operators that this token calls."""
    with MODE, torch.no_grad():
        decoder = layers_of(config).eval()
        for p in decoder.parameters():
            p.data = torch.empty_like(p, dtype=torch.bfloat16)  # .to() would swap them, which a fake parameter refuses
        prepare(decoder)
        caches = decoder.new_caches(BATCH, LENGTH)
        tokens = torch.randint(decoder.config["vocab_size"], (BATCH, 17), device="cuda")
        decoder(tokens[:, :16], caches=caches)
        with Operations() as called:
            decoder(tokens[:, 16:], caches=caches)
    return called.count


def layers_of(config: dict[str, Any], every: bool = False) -> Decoder:
    """A decoder at its real widths, on the GPU, as deep as it has different layers; one with a loop has them all.

    Args:
        every: whether any other has them all too
    """
    model = check(config)
    with torch.device("cuda"):
        decoder = assemble(model)
    nodes = plan(model, registry.layer_kinds(), registry.names)
    if decoder.loop is None and not every:
        decoder.layers = nn.ModuleList(decoder.layers[i] for i, node in enumerate(nodes) if node not in nodes[:i])
    return decoder.choose_kernels()


def _loss(decoder: Decoder, tokens: Tensor, segments: Tensor | None) -> Tensor:
    hidden, routings = decoder.hidden(tokens, segments=segments)
    loss, _ = decoder.nll_and_z(hidden, tokens, z_loss=1e-4)
    later, more = decoder.mtp_nll(hidden, tokens, tokens, segments=segments)
    terms = [nll for nll, _ in later]
    terms += [term for r in (*routings, *more) if r is not None for term in r.losses.values()]
    return sum(terms, loss)


def attend(case: Attention, backward: bool = True) -> None:
    """Forward and, unless it is left out, backward of FlexAttention, on rows that score as a case says."""
    with MODE, torch.device("cuda"):
        (N, K), (H, V), T = case.heads, case.widths, case.length
        shapes = ((N, H), (K, H), (K, V))
        q, k, v = (torch.empty(BATCH, T, n, h, dtype=torch.bfloat16, requires_grad=backward) for n, h in shapes)
        made: dict[str, Callable[[], Any]] = {
            "bias": lambda: torch.empty(1, N, T, T),
            "slopes": lambda: Slopes(torch.empty(N), *torch.zeros(2, 1, T, dtype=torch.long)),
            "band": lambda: Band(
                torch.empty(BATCH, T, N, 512, dtype=torch.bfloat16, requires_grad=backward),
                *torch.zeros(2, 1, T, dtype=torch.long),
            ),
            "segments": lambda: torch.zeros(BATCH, T, dtype=torch.long),
            "sinks": lambda: torch.empty(N, requires_grad=backward),
            "softcap": lambda: 50.0,
        }
        parts = {"bias" if part in ("slopes", "band") else part: made[part]() for part in case.parts}
        scoring = Scoring(0.1, window=case.window, **parts)
        y = flex_causal_attention(q, k, v, scoring)
        if backward:
            y.sum().backward()
