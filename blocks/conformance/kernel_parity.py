"""The checks that any implementation of a kernel must pass: results and gradients are the reference's.

In a test file of a plug-in::

    @pytest.mark.parametrize("case", kernel_cases("attention/local"), ids=str)
    def test_conformance(case):
        case.run()
"""

from __future__ import annotations

import fnmatch
import unittest
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.conformance.cases import Outcome
from blockwright.blocks.conformance.setting import PromiseError
from blockwright.blocks.kernels import attention, coded_attention, cross_entropy, elementwise, recurrence
from blockwright.blocks.kernels import coded_attention as quantising
from blockwright.blocks.kernels.coded_attention import BITS, Codes, group_sizes, quantise
from blockwright.blocks.kernels.grouped_matmul import Choices
from blockwright.blocks.kernels.scoring import Band, Scoring, Slopes
from blockwright.blocks.kernels.seam import EVERY, capability_of, implementations

BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the error's norm as a share of the norm
Draw = Callable[..., Tensor]
Given = tuple[Any, ...]


@dataclass(frozen=True)
class KernelCase:
    """One implementation, one kind of call, one precision."""

    kernel: str
    name: str
    call: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.kernel}/{self.name}: {self.call}, {str(self.dtype).removeprefix('torch.')}"

    def outcome(self) -> Outcome:
        """Whether it agrees; not applicable where it does not run here, or does not take such a call."""
        implementation = implementations(self.kernel)[self.name]
        places = (torch.device(kind) for kind in ("cuda", "cpu") if kind == "cpu" or torch.cuda.is_available())
        device = next((d for d in places if implementation.runs_on(d.type, capability_of(d))), None)
        if device is None:
            return Outcome("not applicable", "runs on none of the devices that are here")
        given = self._given(device, self.dtype)
        wide = torch.float64 if self.dtype == torch.float32 and device.type == "cpu" else torch.float32
        with torch.set_grad_enabled(any(t.requires_grad for t in _tensors(given))):
            if implementation.takes is not None and not implementation.takes(*given):
                return Outcome("not applicable", "does not take such a call, which falls through to another")
            error = greatest_error(implementation.call, _REFERENCES[self.kernel], given, wide)
        if not error <= BOUNDS[self.dtype]:
            return Outcome("failed", f"differs from the reference by {error:.1e} of its norm")
        return Outcome("passed", "")

    def run(self) -> None:
        """Hold the implementation to it.

        Raises:
            PromiseError: it differs
            unittest.SkipTest: it does not apply, as pytest understands
        """
        outcome = self.outcome()
        if outcome.status == "failed":
            raise PromiseError(f"{self}: {outcome.reason}")
        if outcome.status == "not applicable":
            raise unittest.SkipTest(outcome.reason)

    def _given(self, device: torch.device, dtype: torch.dtype) -> Given:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            """Rounded to the precision first: then only what is computed differs."""
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype).to(device).requires_grad_()

        return tuple(_mapped(value, lambda t: t.to(device)) for value in dict(_CALLS[self.kernel](draw))[self.call])


def kernel_cases(pattern: str = "*") -> list[KernelCase]:
    """The cases of the implementations that ``KERNEL`` or ``KERNEL/NAME`` means; both may hold shell wildcards."""
    kernel, _, name = pattern.partition("/")
    return [
        KernelCase(k, n, call, dtype)
        for k in fnmatch.filter(EVERY, kernel)
        for n in fnmatch.filter(implementations(k), name or "*")
        for call, _ in _CALLS[k](torch.zeros)
        for dtype in BOUNDS
    ]


def greatest_error(
    call: Callable[..., Any], reference: Callable[..., Any], given: Given, wide: torch.dtype = torch.float32
) -> float:
    """How far results and gradients are from a reference's in a wider precision, as a share of each one's norm."""
    found, right = _results(call, given), _results(reference, _cast(given, wide))
    errors = [
        float((got.to(wide) - wanted).norm() / wanted.norm().clamp(min=1e-6))
        for got, wanted in zip(found, right, strict=False)
    ]
    return float(torch.tensor(errors, dtype=torch.float32).max())  # NaN if one is


def _results(call: Callable[..., Any], given: Given) -> list[Tensor]:
    """What a call returns, and the gradients of a weighted sum of it by all that is learnt, where it has any."""
    try:
        out = call(*given)
    except NotImplementedError:  # FlexAttention on a CPU
        return [call(*_mapped(given, Tensor.detach))]
    if isinstance(out, Codes):
        return [out.numbers(torch.float32)]
    first = out[0] if isinstance(out, tuple) else out
    weigh = torch.linspace(-1.0, 2.0, first.numel(), dtype=first.dtype, device=first.device).view_as(first)
    learnt = [t for t in _tensors(given) if t.requires_grad]
    return [first.detach(), *(torch.autograd.grad((first * weigh).sum(), learnt) if learnt else ())]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for inner in value:
            yield from _tensors(inner)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        inner = [_mapped(v, change) for v in value]
        return type(value)(*inner) if hasattr(value, "_fields") else tuple(inner)
    return change(value) if isinstance(value, Tensor) else value


def _cast(given: Given, dtype: torch.dtype) -> Given:
    def wide(t: Tensor) -> Tensor:
        return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t

    return _mapped(given, wide)


# ---- calls: what each kernel is given, at odd sizes ------------------------------------------------------------------


def _attention(draw: Draw) -> Iterator[tuple[str, Given]]:
    def heads(T: int, S: int | None = None, N: int = 4, K: int = 2, H: int = 16, V: int = 16) -> Given:
        return draw(2, T, N, H), draw(2, S or T, K, H), draw(2, S or T, K, V)

    ids = torch.tensor([[0] * 5 + [1] * 8, [0] * 13], dtype=torch.int64)
    far = (torch.arange(131)[None] // 50).expand(2, -1).contiguous()
    yield "causal", (*heads(13), Scoring(0.3))
    yield "no groups, narrow values", (*heads(13, K=4, H=24), Scoring(0.3))
    yield "wide values", (*heads(13, V=24), Scoring(0.3))
    yield "131 tokens", (*heads(131), Scoring(0.3))
    yield "131 tokens of documents", (*heads(131), Scoring(0.3, segments=far))
    yield "131 tokens, window", (*heads(131), Scoring(0.3, window=40))
    yield "last tokens", (*heads(3, 13), Scoring(0.3))
    yield "last token", (*heads(1, 13), Scoring(0.3))
    yield "last tokens, window", (*heads(3, 13), Scoring(0.3, window=4))
    yield "documents", (*heads(13), Scoring(0.3, segments=ids))
    yield "bias", (*heads(13), Scoring(0.3, bias=draw(1, 4, 13, 13).detach()))
    places = torch.stack((torch.arange(131) % 50, torch.arange(131)))
    yield "131 tokens, slopes", (*heads(131), Scoring(0.3, bias=Slopes(draw(4).detach(), places, places)))
    late = places[1:, 10:13]
    yield "last tokens, slopes", (*heads(3, 13), Scoring(0.3, bias=Slopes(draw(4).detach(), late, places[1:, :13])))
    band = Band(draw(2, 131, 4, 9).detach(), places, places)
    yield "131 tokens, band", (*heads(131), Scoring(0.3, bias=band))
    yield "131 tokens, band in a window", (*heads(131), Scoring(0.3, bias=band, window=6))
    yield (
        "last tokens, band",
        (*heads(3, 13), Scoring(0.3, bias=Band(draw(2, 3, 4, 5).detach(), late, places[1:, :13]))),
    )
    yield "learnt band", (*heads(13), Scoring(0.3, bias=Band(draw(2, 13, 4, 5), places[:, :13], places[:, :13])))
    yield "learnt bias", (*heads(13), Scoring(0.3, bias=draw(1, 4, 13, 13)))
    yield "sinks", (*heads(13), Scoring(0.3, sinks=draw(4)))
    yield "soft cap", (*heads(13), Scoring(0.3, softcap=2.0))
    cached = draw(2, 1, 4, 16), draw(2, 2, 13, 16).transpose(1, 2), draw(2, 2, 13, 16).transpose(1, 2)
    yield "last token, of a cache", (*(t.detach() for t in cached), Scoring(0.3, bias=draw(2, 1, 1, 13).detach()))
    longer = draw(2, 2, 8, 32), draw(2, 2, 150, 32).transpose(1, 2), draw(2, 2, 150, 48).transpose(1, 2)
    yield "last tokens, of a longer cache", (*(t.detach() for t in longer), Scoring(0.3))


def _encoder_attention(draw: Draw) -> Iterator[tuple[str, Given]]:
    yield "all on all", (draw(2, 13, 4, 18), draw(2, 13, 4, 18), draw(2, 13, 4, 18), 0.3)


def _latent_attention(draw: Draw) -> Iterator[tuple[str, Given]]:
    yield "last token", (draw(2, 1, 3, 24), draw(2, 13, 24), 13, 16, 0.3, None)
    yield "last tokens", (draw(2, 3, 3, 24), draw(2, 16, 24), 13, 16, 0.3, None)
    yield "bias", (draw(2, 3, 3, 24), draw(2, 16, 24), 13, 16, 0.3, draw(1, 3, 3, 13).detach())
    yield "last tokens, decoding", (draw(2, 2, 5, 80).detach(), draw(2, 80, 80).detach(), 77, 48, 0.3, None)
    yield "width of DeepSeek-V3", (draw(1, 1, 3, 576).detach(), draw(1, 128, 576), 99, 512, 0.1, None)


def _coded_attention(draw: Draw) -> Iterator[tuple[str, Given]]:
    def codes(bits: int, S: int, parts: list[int], n_heads: int) -> Codes:
        sizes = group_sizes(parts)
        stored = quantise(draw(2, S + 3, sum(parts)).detach(), bits, sizes)  # of a cache that is not full
        return Codes(*stored, bits, tuple(sizes), n_heads, sum(parts) // n_heads).some(slice(0, S))

    for bits in BITS:
        for n_heads, N, H, S, T in ((2, 8, 64, 37, 1), (3, 6, 10, 145, 2), (4, 4, 100, 19, 5)):
            given = draw(2, T, N, H).detach(), *(codes(bits, S, [H] * n_heads, n_heads) for _ in range(2))
            yield f"{bits} bits, {N} on {n_heads} heads of {H}, {T} of {S} tokens", (*given, Scoring(0.3))
        latents = codes(bits, 77, [80, 17], 1)
        q, bias = draw(2, 3, 5, 97).detach(), draw(2, 1, 3, 77).detach()
        yield f"{bits} bits, latents, bias", (q, latents, latents._replace(width=80), Scoring(0.3, bias))
        sinks = Scoring(0.3, sinks=draw(8).detach(), softcap=2.0)
        heads = [codes(bits, 21, [33] * 4, 4) for _ in range(2)]
        yield f"{bits} bits, sinks and soft cap", (draw(2, 1, 8, 33).detach(), *heads, sinks)


def _coding(draw: Draw) -> Iterator[tuple[str, Given]]:
    for bits in BITS:
        sizes = tuple(group_sizes([40, 40]))
        x = draw(2, 5, 80).detach()
        into = Codes(*quantise(torch.zeros_like(x), bits, sizes), bits, sizes, 2, 40)
        yield f"{bits} bits", (x, into)


def _experts(draw: Draw) -> Iterator[tuple[str, Given]]:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.rand(21, 5, generator=generator, dtype=torch.float32).topk(2, -1).indices
    some = chosen.masked_fill(torch.rand(21, 2, generator=generator, dtype=torch.float32) < 0.4, 5)
    weights = draw(5, 14, 24), draw(5, 24, 7)
    yield "all choices", (draw(21, 24), Choices(chosen, draw(21, 2)), *weights)
    yield "choices left out", (draw(21, 24), Choices(some, draw(21, 2), int((some < 5).sum())), *weights)
    for most in (None, 40):  # as many rows are computed, of which some have no expert
        shares = draw(21, 2).detach().masked_fill(some == 5, 0)
        name = f"choices left out, {'not counted' if most is None else 'counted too high'}"
        yield name, (draw(21, 24), Choices(some, shares, most), *weights)
    real = draw(5, 96, 272).detach(), draw(5, 272, 48).detach()
    shares = draw(3, 2).detach().masked_fill(some[:3] == 5, 0)
    yield "few tokens, decoding", (draw(3, 272).detach(), Choices(some[:3], shares), *real)


def _cross_entropy(draw: Draw) -> Iterator[tuple[str, Given]]:
    targets = (torch.arange(21) * 5 % 37).masked_fill(torch.arange(21) % 7 == 3, cross_entropy.IGNORED)
    yield "plain", (draw(21, 24), draw(37, 24), targets, None, 0.0)
    yield "soft cap and z-loss", (draw(21, 24), draw(37, 24), targets, 3.0, 0.1)


def _recurrence_each(draw: Draw) -> Iterator[tuple[str, Given]]:
    for T, channels in ((1, 1), (3, 37)):
        q, k, v = (F.normalize(draw(2, T, 8, width), dim=-1).detach() for width in (37, 37, 64))
        decay, beta = -draw(2, T, 8, channels).detach().exp(), draw(2, T, 8).detach().sigmoid()
        state = draw(2, 8, 37, 64).detach().float()
        yield f"{T} tokens", (q, k, v, decay, beta, state)
        yield f"{T} tokens, erasing", (q, k, v, decay, None, state, None, k * beta[..., None])


def _linear(draw: Draw) -> Iterator[tuple[str, Given]]:
    for rows, bias in ((1, None), (3, draw(48).detach()), (21, None)):
        yield f"{rows} rows", (draw(rows, 256).detach(), draw(48, 256).detach(), bias)


def _recurrence(draw: Draw) -> Iterator[tuple[str, Given]]:
    def given(T: int, channels: int) -> list[Any]:
        q, k, v = (F.normalize(draw(2, T, 3, width), dim=-1).detach() for width in (5, 5, 7))
        leaves = [t.requires_grad_() for t in (q, k, v, -draw(2, T, 3, channels).detach().exp())]
        return [*leaves, draw(2, T, 3).detach().sigmoid().requires_grad_(), draw(2, 3, 5, 7).detach()]

    documents = torch.arange(149)[None] // torch.tensor([[40], [100]], dtype=torch.int64)
    for name, channels in {"decay by head": 1, "decay by channel": 5}.items():
        yield name, (*given(149, channels), None)
        yield f"{name}, packed", (*given(149, channels), documents)
        q, k, v, decay, _, state = given(149, channels)
        yield f"{name}, no delta rule", (q, k, v, decay, None, state, None)
        yield f"{name}, one token", (*given(1, channels), None)
        q, k, v, decay, _, state = given(149, channels)
        erase, at = (F.normalize(draw(2, 149, 3, 5), dim=-1).detach().requires_grad_() for _ in range(2))
        yield f"{name}, erasing", (q, k, v, decay, None, state, None, erase)
        yield f"{name}, erasing elsewhere, packed", (q, k, v, decay, None, state, documents, erase, at)
    for T, channels in ((1, 1), (3, 37)):  # of a state as large as those of real models, without gradients
        q, k, v = (F.normalize(draw(2, T, 8, width), dim=-1).detach() for width in (37, 37, 64))
        decay, beta = -draw(2, T, 8, channels).detach().exp(), draw(2, T, 8).detach().sigmoid()
        state = draw(2, 8, 37, 64).detach().float()
        yield f"decoding, {T} tokens", (q, k, v, decay, beta, state, None)
        yield f"decoding, {T} tokens, erasing", (q, k, v, decay, None, state, None, k * beta[..., None])
        at = F.normalize(draw(2, T, 8, 37), dim=-1).detach()
        yield f"decoding, {T} tokens, erasing elsewhere", (q, k, v, decay, None, state, None, k * beta[..., None], at)


def _rms_norm(draw: Draw) -> Iterator[tuple[str, Given]]:
    yield "rows", (draw(3, 7, 24), draw(24), 1e-5)
    yield "few rows, decoding", (draw(3, 1, 272).detach(), draw(272).detach(), 1e-5)


def _gated_silu(draw: Draw) -> Iterator[tuple[str, Given]]:
    yield "rows", (draw(3, 7, 22), draw(3, 7, 22))


def _rotation(draw: Draw) -> Iterator[tuple[str, Given]]:
    angles = torch.linspace(0.0, 3.0, 7 * 4, dtype=torch.float32).view(1, 7, 4)
    for interleaved in (False, True):
        given = (draw(3, 7, 2, 10), angles.cos(), angles.sin(), interleaved)
        yield "neighbouring pairs" if interleaved else "half a head apart", given


def _swiglu_experts_reference(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert by expert, token by token."""
    y = torch.zeros_like(x)
    for e in range(len(gate_up)):
        gate, up = (x @ gate_up[e].t()).chunk(2, -1)
        share = (choices.weights * (choices.experts == e)).sum(1, keepdim=True)
        y = y + share * (F.silu(gate) * up @ down[e].t())
    return y


_CALLS: dict[str, Callable[[Draw], Iterator[tuple[str, Given]]]] = {
    "attention": _attention,
    "latent_attention": _latent_attention,
    "coded_attention": _coded_attention,
    "coding": _coding,
    "recurrence_each": _recurrence_each,
    "linear": _linear,
    "recurrence": _recurrence,
    "encoder_attention": _encoder_attention,
    "experts": _experts,
    "cross_entropy": _cross_entropy,
    "rms_norm": _rms_norm,
    "gated_silu": _gated_silu,
    "rotation": _rotation,
}
_REFERENCES: dict[str, Callable[..., Any]] = {
    "attention": attention.causal_attention_reference,
    "latent_attention": attention.latent_attention_reference,
    "coded_attention": coded_attention.coded_attention_reference,
    "coding": quantising.store,
    "recurrence_each": recurrence.recurrence_each,
    "linear": F.linear,
    "recurrence": recurrence.recurrence_reference,
    "encoder_attention": attention.encoder_attention_reference,
    "experts": _swiglu_experts_reference,
    "cross_entropy": cross_entropy.linear_cross_entropy_reference,
    "rms_norm": elementwise.rms_norm_reference,
    "gated_silu": elementwise.gated_silu_reference,
    "rotation": elementwise.rotate_pairs_reference,
}
