"""A batch of as many sequences as fit into a memory of caches, decoded step by step."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import prefill
from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.clock import Seconds, timed
from blockwright.plugins.equal_memory.request import Settings

SEED = 0  # of prompts and first tokens
CHUNK = 1024  # tokens of a prompt in one pass, so that a selector's scores of a long one fit


def allocated(caches: Sequence[Cache]) -> int:
    """Bytes of the memory behind the buffers of caches; each allocation counts once, filled or not."""
    storages = [buffer.untyped_storage() for cache in caches for buffer in cache.buffers.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class FullBatch:
    """Sequences of one length, as many as fit.

    The model reads one random prompt, so that every kind of cache, state and choice of keys holds what decoding gives
    it. A turn copies its caches to all rows, which then continue with tokens of their own.

    Args:
        decoder: with weights, in evaluation mode
        cell: its context is what each cache has room for, and holds after a turn
        settings: bytes of the caches of all rows, rows at most, and tokens of every row that a turn times

    Attributes:
        row_bytes: bytes allocated for the caches of one row
        rows: B, sequences at once
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, cell: Cell, settings: Settings) -> None:
        self.decoder, self.steps = decoder, settings.steps
        self.device = decoder.output_weight.device
        self.draws = torch.Generator().manual_seed(SEED)
        self._one = decoder.new_caches(1, cell.context, cell.bits)
        prefill(decoder, self._tokens(1, cell.context - self.steps - 1), self._one, CHUNK)
        self.row_bytes = allocated(self._one)
        limits = [settings.budget // self.row_bytes] if self.row_bytes else []
        self.rows = min(limits if settings.rows is None else [*limits, settings.rows])

    def _tokens(self, rows: int, count: int) -> torch.Tensor:
        drawn = torch.randint(self.decoder.config["vocab_size"], (rows, count), generator=self.draws)
        return drawn.to(self.device)

    def caches(self) -> list[Cache]:
        """Caches of all rows, one step and those that are timed before they are full."""
        caches = copy.deepcopy(self._one)
        for cache in caches:
            cache.take(torch.zeros(self.rows, dtype=torch.int64, device=self.device))
        return caches

    @torch.inference_mode()
    def turn(self) -> tuple[Seconds, int]:
        """Decode all rows, and drop their caches.

        Returns:
            seconds of a step, and the bytes allocated for the caches of all rows
        """
        caches, tokens = self.caches(), self._tokens(self.rows, 1)
        tokens = self._step(tokens, caches)  # kernels and memory are ready after it

        def decode() -> None:
            last = tokens
            for _ in range(self.steps):
                last = self._step(last, caches)

        return timed(decode, self.device) / self.steps, allocated(caches)

    def _step(self, tokens: torch.Tensor, caches: Sequence[Cache]) -> torch.Tensor:
        """Tokens [B,1] → the likeliest next ones, [B,1]."""
        return prefill(self.decoder, tokens, caches).argmax(-1, keepdim=True)
