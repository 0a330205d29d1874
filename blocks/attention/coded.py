"""Attention of new tokens to a quantised cache whose codes are read as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockwright.blocks.attention.biases import score_terms
from blockwright.blocks.attention.latents import queries_of_latents
from blockwright.blocks.attention.remembered import Layout
from blockwright.blocks.base import Queries
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.kernels.coded_attention import FEW
from blockwright.blocks.kernels.latent_attention import out_of_latents
from blockwright.blocks.kernels.scoring import Scoring

if TYPE_CHECKING:
    from blockwright.blocks.attention.scored import Scored


def reads_codes(block: Scored, cache: Cache, q: Tensor, n_new: int) -> bool:
    """Whether queries [B,T,N,H], the last of so many new tokens, attend to the codes of a cache: all of these are few,
    and what is remembered is keys and values as they are, or latents, of all of which every query sees those before it.
    Of the last token of a long prompt, too, the cache is read in parts."""
    if not cache.gives_codes(n_new) or n_new > FEW or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if block.kernels.coded_attention == "whole" or cache.segments() is not None:  # nothing reads codes on this device
        return False
    others = block.selector, block.scores, block.kv_source
    if any(child is not None for child in others) or block.position.slots():
        return False
    return block.up() is not None or block.remembers_heads()


def attend_to_codes(
    block: Scored, given: Pass, queries: Queries, cache: Cache, new: tuple[Tensor, ...], shape: Layout
) -> Tensor:
    """``Scored.attend`` of the last T tokens, after all new ones are appended, where it ``reads_codes``."""
    keys, *values = cache.append_codes(*new)
    q, scoring = queries.q, Scoring(block.scale, score_terms(block.position, queries, given)[0])
    if (up := block.up()) is None:
        return block.kernels.attend_codes(q, keys, values[0], scoring)
    q, value_up = queries_of_latents(q, up, shape)
    y = block.kernels.attend_codes(q, keys, keys._replace(width=up.shape[-1]), scoring)
    return out_of_latents(y, value_up)
