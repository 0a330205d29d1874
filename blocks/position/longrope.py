from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor

from blockwright.blocks.kernels.elementwise import angles, base_frequencies, rotary_width, turn
from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, Positive, Share, Stretch

Gain = Annotated[float, Gt(0), Le(3)]  # squared on the scores; beyond 3 a softmax chooses one key


@register("position", "longrope")
class LongRoPE(Position):
    """RoPE with a divisor for each pair: one list of them for long sequences, another for short ones.

    Ding et al. 2024 (LongRoPE), arXiv 2402.13753; Shang et al. 2025 (LongRoPE2), arXiv 2502.20082, §3; Phi-3:
    frequency_j = theta^(−2j/R) / λ_j. λ is ``long_factors`` in sequences longer than L, else ``short_factors``, by
    default 1: the trained positions, so that short texts are read as before. Train on windows of both lengths
    (``data.lengths``), as LongRoPE2 does.

    The papers search λ by evolution. By default it is here where LongRoPE2's search starts, without a search: with
    c = R ln(L/(2π turns)) / (2 ln theta), the pair that rotates ``turns`` times in L tokens,
    λ_j = factor^min(j/c, 1): NTK below c, the full factor from there on. 2.7 turns give c = 25.0 for Phi3-mini and 30.1
    for Llama-3-8B, where the searches found 25 and 30; the theory, 1 turn, gives 31 and 35.

    A sequence has the length that is *declared*: its window without a cache, its prompt and the new tokens that are
    asked for where a text is continued, the room of a conversation, or ``length`` where given. So a chunked prefill and
    the tokens decoded after it are rotated alike, and nothing cached ever has to be computed again; but a text is read
    otherwise in a longer window. So evaluation pads no short sequence to a long one (blocks/position/base.py),
    and policy optimisation needs ``length``, unless all sequences are on one side of L. transformers and the paper
    switch at the token that exceeds L, where keys cached before keep the short factors (transformers) or all are
    computed again (the paper).

    Args:
        theta: base of the frequencies as trained
        factor: ratio of the new to the trained context length
        original_positions: L, trained context length in tokens
        long_factors: λ_j of sequences longer than L, one for each pair or one for all; null: the formula above
        short_factors: λ_j of the others; null: 1
        turns: rotations in L tokens of the pair from which on the formula divides by the whole factor
        long_mscale: amplitude of rotated queries and keys in long sequences; null: √(1 + ln factor / ln L)
        short_mscale: amplitude in the others. transformers has one for both (``attention_factor``)
        length: declared length of every sequence, in tokens; null: of each pass by itself. For PoSE, whose windows are
            shorter than their positions; attentions that do not pass lengths use the model's max_positions
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"original_positions": 2, "turns": 0.02}  # all windows are long

    def __init__(
        self,
        head_dim: int,
        max_positions: int,
        theta: Annotated[float, Gt(1)] = 10000.0,
        factor: Stretch = 4.0,
        original_positions: Annotated[int, Gt(1)] = 4096,
        long_factors: list[Positive] | None = None,
        short_factors: list[Positive] | None = None,
        turns: Positive = 2.7,
        long_mscale: Gain | None = None,
        short_mscale: Gain = 1.0,
        length: Count | None = None,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.original_positions, self.interleaved = theta, original_positions, pairing == "interleaved"
        pairs = self.rotary_dim // 2
        critical = pairs * math.log(original_positions / (2 * math.pi * turns)) / math.log(theta)
        stretched = [factor ** min(j / max(critical, 1.0), 1.0) for j in range(pairs)]
        self.long_factors = _one_each("long_factors", long_factors, stretched)
        self.short_factors = _one_each("short_factors", short_factors, [1.0] * pairs)
        self.long_mscale = long_mscale or math.sqrt(1 + math.log(factor) / math.log(original_positions))
        self.short_mscale = short_mscale
        self.declared, self.longest = length, length or max_positions
        self.boundary = None if length else original_positions

    def frequencies(self, device: torch.device, length: int | None = None) -> Tensor:
        """Radians per position for each pair in sequences of ``length`` tokens, the longest by default, [R/2] fp32."""
        is_long = (length or self.longest) > self.original_positions
        factors = torch.tensor(self.long_factors if is_long else self.short_factors, dtype=torch.float32).to(device)
        return base_frequencies(self.theta, self.rotary_dim, device) / factors

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotate_in(q, k, positions, self.longest)

    def rotate_in(self, q: Tensor, k: Tensor, positions: Tensor, length: int | Tensor) -> tuple[Tensor, Tensor]:
        length, ends = self.declared or length, self.original_positions
        short, long = (
            angles(positions, self.frequencies(q.device, ends + i), (self.short_mscale, self.long_mscale)[i])
            for i in (0, 1)
        )
        if isinstance(length, Tensor):
            is_long = (length > ends)[:, None, None]
            of_rows = torch.where(is_long, long[0], short[0]), torch.where(is_long, long[1], short[1])
        else:
            of_rows = long if length > ends else short
        return turn(q, k, of_rows, self.interleaved, self.kernels.rotate)


def _one_each(name: str, given: list[float] | None, default: list[float]) -> list[float]:
    """The factors given, else the default ones.

    Raises:
        BlockError: there is not one for each pair, or one for all
    """
    if given is None:
        return default
    if len(given) not in (1, len(default)):
        rule = f"has {len(given)} factors, but {len(default)} pairs are rotated"
        raise BlockError(name, given, rule, "Write one for each pair, from the fastest on, or one for all")
    return given * (len(default) // len(given))
