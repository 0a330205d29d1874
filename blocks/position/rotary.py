"""Positions that rotate pairs of dimensions of queries and keys: RoPE, and its stretched forms."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn

from blockwright.blocks.kernels.elementwise import Angles, angles, base_frequencies, rotary_width, turn
from blockwright.blocks.position.base import Position
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Count, NonNegative, Positive, Share, Stretch

OF_MODULES = frozenset(vars(nn.Module()))  # attributes that are no settings


class Rotary(Position):
    """Rotates pairs of dimensions by position · frequency: the base of ``rope``, ``yarn`` and others.

    A subclass has ``frequencies``, and sets ``interleaved`` and, where rotated dimensions are scaled, ``amplitude``.
    """

    interleaved: bool
    amplitude: float = 1.0

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        raise NotImplementedError

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.turned(q, k, self.angles(positions))

    def alike(self) -> Hashable | None:
        """Class and settings, where these are plain values and all there is, and it rotates as this class does."""
        if type(self).rotate is not Rotary.rotate or type(self).rotate_in is not Position.rotate_in:
            return None
        own = {name: value for name, value in vars(self).items() if name not in OF_MODULES and name != "kernels"}
        plain = all(value is None or isinstance(value, (int, float, str)) for value in own.values())
        return None if self._parameters or self._buffers or self._modules or not plain else (type(self), *own.values())

    def angles(self, positions: Tensor) -> Angles:
        return angles(positions, self.frequencies(positions.device), self.amplitude)

    def turned(self, q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        return turn(q, k, angles, self.interleaved, self.kernels.rotate)


@register("position", "rope")
class RoPE(Rotary):
    """Rotary position embedding: pairs of dimensions are rotated by an angle proportional to the position.

    Su et al. 2021, arXiv 2104.09864: pair j of R/2 rotates by t · theta^(−2j/R); scores depend on distances only.

    Pairs are (j, j + R/2) as in Llama, Mixtral and Qwen checkpoints (``half_split``), or (2j, 2j + 1) as in the paper
    and every MLA checkpoint (``interleaved``). With the same weights the two differ; permuting the rows of the query
    and key projections maps one to the other. Angles are fp32 whatever the model's precision.

    Args:
        theta: base of the frequencies; larger rotates slower and reaches further
        rotary_fraction: leading fraction of the head width that is rotated; the rest is unchanged (GPT-NeoX, Phi)
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta = theta
        self.interleaved = pairing == "interleaved"

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        return base_frequencies(self.theta, self.rotary_dim, device)


@register("position", "rope_linear")
class LinearRoPE(Rotary):
    """RoPE with positions divided by a factor, so that a longer context spans the angles of the trained one.

    Chen et al. 2023 (position interpolation), arXiv 2306.15595: frequency_j = theta^(−2j/R) / factor. Gemma-3's full
    layers (factor 8). Every pair is slowed equally, at the cost of fine distances; ``rope_ntk``, ``rope_llama3`` and
    ``yarn`` spare the fast pairs.

    Args:
        theta: base of the frequencies
        factor: ratio of the new to the trained context length
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        factor: Stretch = 4.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.factor, self.interleaved = theta, factor, pairing == "interleaved"

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        return base_frequencies(self.theta, self.rotary_dim, device) / self.factor


@register("position", "rope_ntk")
class NTKRoPE(Rotary):
    """RoPE with a larger base, so that the slowest pair is stretched by the factor and the fastest hardly changes.

    bloc97 2023 ("NTK-aware scaled RoPE"), described in arXiv 2309.00071, §3.1: theta' = theta · factor^(R/(R−2)).

    The base is fixed, so cached keys stay valid however long the sequence grows. transformers' ``dynamic`` type lets
    theta grow with the sequence length, replacing the factor by factor · length/trained − (factor − 1).

    Args:
        theta: base of the frequencies as trained
        factor: ratio of the new to the trained context length
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        factor: Stretch = 4.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        if self.rotary_dim < 4:
            rule = "needs at least two pairs: the exponent R/(R − 2) is infinite for one"
            raise BlockError("rotary_fraction", rotary_fraction, rule, "Choose wider heads")
        self.theta = theta * factor ** (self.rotary_dim / (self.rotary_dim - 2))
        self.interleaved = pairing == "interleaved"

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        return base_frequencies(self.theta, self.rotary_dim, device)


@register("position", "rope_llama3")
class Llama3RoPE(Rotary):
    """RoPE with Llama-3.1's context extension: slow pairs divided by the factor, fast ones kept, blended in between.

    Grattafiori et al. 2024 (Llama 3), arXiv 2407.21783, with the formula of the released code. With w_j = 2π/f_j the
    pair's wavelength and L the original context: f_j is kept if w_j < L/high_freq_factor, divided by ``factor`` if
    w_j > L/low_freq_factor, else (1 − s) f_j/factor + s f_j with
    s = (L/w_j − low_freq_factor)/(high_freq_factor − low_freq_factor).

    Unlike ``yarn`` it blends by frequency, not by pair index, and does not change the softmax.

    Args:
        theta: base of the frequencies; 500000 in Llama-3
        factor: divisor of slow frequencies; 8 in Llama-3.1
        low_freq_factor: rotations over the original context below which a pair is fully slowed
        high_freq_factor: rotations above which a pair is unchanged
        original_positions: L, trained context length in tokens
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 500000.0,
        factor: Stretch = 8.0,
        low_freq_factor: Positive = 1.0,
        high_freq_factor: Positive = 4.0,
        original_positions: Count = 8192,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__()
        if not high_freq_factor > low_freq_factor:
            rule = f"must be above low_freq_factor ({low_freq_factor})"
            raise BlockError("high_freq_factor", high_freq_factor, rule, "Use 1 and 4, as Llama-3.1")
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.factor, self.interleaved = theta, factor, pairing == "interleaved"
        self.low, self.high, self.original_positions = low_freq_factor, high_freq_factor, original_positions

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        base = base_frequencies(self.theta, self.rotary_dim, device)
        turns = self.original_positions * base / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * base / self.factor + kept * base


@register("position", "yarn")
class YaRN(Rotary):
    """RoPE stretched to a longer context: slow pairs are interpolated, fast ones kept, and the softmax is sharpened.

    Peng et al. 2023, arXiv 2309.00071, as DeepSeek-V2/V3 use it. With base frequency f_j = theta^(−2j/R) and
    corr(ρ) = R ln(L/(2πρ)) / (2 ln theta): low = ⌊corr(beta_fast)⌋, high = ⌈corr(beta_slow)⌉,
    ramp_j = clamp((j − low)/(high − low), 0, 1), frequency_j = f_j (1 − ramp_j) + f_j/factor · ramp_j.
    With g(m) = 0.1 m ln(factor) + 1: cosines and sines are multiplied by g(mscale)/g(mscale_all_dim), and the
    attention's scale by g(mscale_all_dim)². The YaRN paper and gpt-oss scale rotated queries and keys by g(1) each:
    mscale 1 and mscale_all_dim 0.

    The stretch applies at every length, as in the Hugging Face implementations; DeepSeek's inference code applies it
    only beyond the original context. transformers before 5 omitted the g² in DeepSeek-V2.

    Args:
        theta: base of the frequencies
        factor: ratio of the new to the original context length
        original_positions: L, original context length in tokens
        beta_fast: rotations over the original context above which a pair is unchanged
        beta_slow: rotations below which a pair is fully interpolated
        mscale: m of the amplitude; 0.707 in V2, 1.0 in V2.5 and V3
        mscale_all_dim: m of the softmax temperature; 0 leaves the softmax unchanged and scales the amplitude only
        rotary_fraction: leading fraction of the head width that is rotated
        pairing: which dimensions form a pair; released MLA weights are interleaved
        truncate: whether low and high are rounded outwards to whole pairs; false in gpt-oss
    """

    def __init__(
        self,
        head_dim: int,
        theta: Annotated[float, Gt(1)] = 10000.0,
        factor: Stretch = 40.0,
        original_positions: Count = 4096,
        beta_fast: Positive = 32.0,
        beta_slow: Positive = 1.0,
        mscale: NonNegative = 1.0,
        mscale_all_dim: NonNegative = 1.0,
        rotary_fraction: Share = 1.0,
        pairing: Literal["half_split", "interleaved"] = "interleaved",
        truncate: bool = True,
    ) -> None:
        super().__init__()
        self.rotary_dim = rotary_width(head_dim, rotary_fraction)
        self.theta, self.factor, self.original_positions = theta, factor, original_positions
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.interleaved, self.truncate = pairing == "interleaved", truncate
        self.amplitude = self._gain(mscale) / self._gain(mscale_all_dim)
        self.softmax_scale = self._gain(mscale_all_dim) ** 2

    def _gain(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def _pair_with(self, turns: float) -> float:
        """Index of the pair with this many rotations over the original context."""
        numerator = self.rotary_dim * math.log(self.original_positions / (2 * math.pi * turns))
        return numerator / (2 * math.log(self.theta))

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per position for each pair, [R/2] fp32."""
        pairs = torch.arange(self.rotary_dim // 2, device=device, dtype=torch.float32)
        base = base_frequencies(self.theta, self.rotary_dim, device)
        low, high = self._pair_with(self.beta_fast), self._pair_with(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = ((pairs - low) / ((high - low) or 0.001)).clamp(0, 1)
        return base * (1 - ramp) + base / self.factor * ramp


@register("position", "rope_fastest")
class RoPEFastest(RoPE):
    """Rotary positions in which only the fastest pairs turn, and the others keep no position (p-RoPE).

    Barbero et al. 2024, arXiv 2410.06205; Gemma-4 (``proportional``): pair j of H/2 rotates by t · theta^(−2j/H) for
    j < rotary_fraction · H/2, else by 0. ``rope`` with the same fraction takes its pairs from the first part of the
    head, and spreads all frequencies over them.

    Args:
        theta: base of the frequencies
        rotary_fraction: share of the pairs that turn, at least one; 0.25 in Gemma-4
        pairing: which dimensions form a pair
    """

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        rotary_fraction: Share = 0.25,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__(head_dim, theta, pairing=pairing)
        self.n_turning = max(1, int(head_dim * rotary_fraction) // 2)

    def frequencies(self, device: torch.device) -> Tensor:
        every = super().frequencies(device)
        return every * (torch.arange(len(every), device=device) < self.n_turning)


@register("position", "rope_chosen")
class RoPEChosen(RoPE):
    """Rotary positions whose frequencies are picked from those of another head, a list that is stored with the weights.

    The rotated part of MLA has R/2 pairs; a model whose heads turned H/2 pairs has more, and each layer keeps its most
    important ones, in any number of copies (TransMLA, arXiv 2502.07864, and MHA2MLA, arXiv 2502.14837, choose by norms
    too). Pair i rotates by t · theta^(−2 j_i / H), with j [R/2] a buffer that is set with derived weights. In a new
    model they are spread evenly over the H/2. Here they are part of the checkpoint, and differ by layer.

    Args:
        theta: base of the frequencies
        of_dim: H, width of the head whose frequencies are picked from; null is the rotated width, then all are used
        pairing: which dimensions form a pair
    """

    chosen: Tensor

    def __init__(
        self,
        head_dim: int,
        theta: Positive = 10000.0,
        of_dim: Count | None = None,
        pairing: Literal["half_split", "interleaved"] = "half_split",
    ) -> None:
        super().__init__(head_dim, theta, pairing=pairing)
        self.of_dim = of_dim or head_dim
        if self.of_dim % 2:
            raise BlockError("of_dim", of_dim, "is the width of a head of pairs, so it is even", "Write an even number")
        self.register_buffer("chosen", torch.zeros(head_dim // 2, dtype=torch.int64))

    def reset_parameters(self) -> None:
        number = len(self.chosen)
        self.chosen.copy_(torch.arange(number) * (self.of_dim // 2) // number)

    def frequencies(self, device: torch.device) -> Tensor:
        return base_frequencies(self.theta, self.of_dim, device)[self.chosen.to(device)]


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
