"""Which attention kernel a decoder gets on an NVIDIA GPU that need not be here.

torch chooses one of its fused attentions at each call. Where none takes it, torch computes all scores without a word:
MATH, whose memory grows with the square of the length. The conditions are those of torch 2.10 (its sdp_utils.cpp);
newer versions take more. Not run on a GPU by this project so far.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from blockwright.blocks.base import Block
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.attention import Called, as_called, cudnn_takes_widths, flash_takes
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import chain, first_to_take
from blockwright.blocks.sample import sampled

CARDS: Mapping[str, tuple[int, int]] = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}  # A100, H100, B200
MATH = "MATH"
LENGTH = 256  # tokens of the passes; no kernel depends on it


Passes = dict[str, list[str]]  # kind of pass → kernels


def attention_kernels(decoder: Decoder, cards: Mapping[str, tuple[int, int]] = CARDS) -> dict[str, Passes]:
    """The kernels of a decoder's attention in bf16, on each card and for each kind of pass.

    Args:
        decoder: on any device
        cards: name → compute capability

    Returns:
        card → ``training``, with one document a row; ``documents``, with several; ``token``, one after a past → several
        kernels where layers differ: ``flash``, ``efficient`` and ``cudnn``, joined by ``or`` where torch may choose,
        ``MATH``, or another implementation's name; none where no layer attends by ``task.kernels.attention``
    """
    one_of_each, _ = sampled(decoder)
    probe = copy.deepcopy(one_of_each).to(torch.bfloat16).requires_grad_()
    found: dict[str, Passes] = {name: {} for name in cards}
    for kind, run in (("training", _train), ("documents", partial(_train, documents=True)), ("token", _decode)):
        noted = _Noted(cards)
        run(probe, noted)
        for card, kernels in noted.kernels.items():
            found[card][kind] = list(dict.fromkeys(kernels))
    return found


def every(passes: Passes) -> list[str]:
    """The kernels of all kinds of pass, each once."""
    return list(dict.fromkeys(name for names in passes.values() for name in names))


def takers(called: Called, capability: tuple[int, int]) -> list[str]:
    """torch's fused attentions that take a call on a GPU from compute capability 8.0 on."""
    H, V, dtype = called.q.shape[-1], called.v.shape[-1], called.q.dtype
    found = ["flash"] if flash_takes(called) else []
    if not called.grouped and H % (aligned := 16 // dtype.itemsize) == V % aligned == 0:
        found.append("efficient")
    if capability[0] in (9, 10) and called.seen != "last" and called.k.shape[2] > 1 and cudnn_takes_widths(H, V, dtype):
        found.append("cudnn")
    return found


class _Noted:
    """Stands in for the kernels of attention: notes which a card would use, and computes shapes alone."""

    def __init__(self, cards: Mapping[str, tuple[int, int]]) -> None:
        self.cards, self.kernels = cards, {name: list[str]() for name in cards}

    def into(self, decoder: Decoder) -> None:
        """Use it in every block."""
        kernels = decoder.kernels.attending_by(self)
        for module in decoder.modules():
            if isinstance(module, Block):
                module.kernels = kernels

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        for card, capability in self.cards.items():
            name = first_to_take(chain("attention", None, "cuda", capability), q, k, v, scoring).name
            if name == "sdpa" and scoring.softcap is None:
                name = " or ".join(takers(as_called(q, k, v, scoring, True), capability)) or MATH
            self.kernels[card].append("reference" if name == "sdpa" else name)
        return q.new_empty(*q.shape[:3], v.shape[-1])


def _train(probe: Decoder, noted: _Noted, documents: bool = False) -> None:
    noted.into(probe.train())
    tokens = _tokens(probe)
    probe.hidden(tokens, segments=torch.zeros_like(tokens) if documents else None)


def _decode(probe: Decoder, noted: _Noted) -> None:
    tokens = _tokens(probe)
    with torch.no_grad():
        caches = probe.eval().choose_kernels().new_caches(1, tokens.shape[1])
        probe.hidden(tokens[:, :-1], caches=caches)
        noted.into(probe)
        probe.hidden(tokens[:, -1:], caches=caches)


def _tokens(decoder: Decoder) -> Tensor:
    return torch.zeros(1, min(LENGTH, decoder.config["max_positions"]), dtype=torch.long, device="meta")
