"""x Wᵀ + b, and how a process multiplies fp32 matrices on a CPU: several ways give the same numbers but for rounding.

**Large products.** PyTorch uses MKL, which is slow on some processors. With
``torch.set_float32_matmul_precision("medium")`` it uses oneDNN instead, up to twice as fast there. The setting also
*allows* bf16 inside, which processors with matrix units (AMX) use, so it is chosen only after a product on this machine
has shown full fp32 accuracy. On a GPU the CPU does not matter: there fp32 is full fp32 on every host.

**A few rows**, as in decoding, are multiplied by other implementations of ``linear``, or by MKL even where larger
products are oneDNN's (``by_mkl``). They are registered with ``automatic=False``: on a CPU only measurement or the user
chooses one, for a number of rows.

A ``Choice`` is measured (blocks/kernels/timing.py) or stated. Without one, everything is torch's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import Implementation, chain, compute, first_to_take, implementations, kernel
from blockwright.blocks.precision import matmul_precision

Precision = Literal["highest", "high", "medium"]  # of torch.set_float32_matmul_precision
FULL_FP32 = 1e-6  # relative error of a product of 512 terms: fp32 has 3e-7, bf16 inside 2e-3
MOST = 16  # entries of a choice that is read


MANY, CACHED = "many rows", "cached latents"  # what is computed, for people


def few(rows: int) -> str:
    return f"{rows} row{'s' * (rows > 1)}"


class Faster(NamedTuple):
    """A way that was measured against torch's own.

    Args:
        of: what is computed
        way, usual: the two
        ratio: seconds of the usual one ÷ of the other; 0: other work disturbed every measurement
    """

    of: str
    way: str
    usual: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.way} {self.ratio:.2f} × {self.usual}" if self.ratio else f"{self.way}: the machine was too busy"


@dataclass(frozen=True)
class Choice:
    """How fp32 matrices are multiplied on a CPU; without arguments, as torch does.

    Args:
        matmul: precision of large products: ``medium`` is oneDNN's, any other MKL's
        few_rows: rows → the implementations of ``linear`` that are asked for as many and fewer, before torch's
        cached: whether MKL reads a cache of latents or codes for a few queries, even where larger products are oneDNN's
        found: what was measured, whatever came of it
    """

    matmul: Precision = "highest"
    few_rows: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    cached: bool = False
    found: tuple[Faster, ...] = ()

    def shown(self) -> dict[str, str]:
        """What computes, and what was measured: ``1 row`` → ``fast, else torch (fast 1.48 × torch)``."""
        names = {MANY: "oneDNN" if self.matmul == "medium" else "torch"}
        names |= {few(rows): ", else ".join((*ways, "torch")) for rows, ways in self.few_rows.items()}
        names |= {CACHED: "mkl" if self.cached else "torch"}
        ratios = {of: ", ".join(str(each) for each in self.found if each.of == of) for of in names}
        return {of: name + (f" ({ratios[of]})" if ratios[of] else "") for of, name in names.items()}

    def as_plain(self) -> dict[str, Any]:
        """For JSON and checkpoints."""
        rows = {str(rows): list(names) for rows, names in self.few_rows.items()}
        return {**asdict(self), "few_rows": rows, "found": [list(each) for each in self.found]}

    @classmethod
    def read(cls, plain: Any) -> Choice | None:
        """The choice of ``as_plain``, which is not trusted: anything else is None, and unknown names are left out."""
        try:
            known, matmul, cached = implementations("linear"), plain["matmul"], plain["cached"]
            rows = {int(n): tuple(name for name in names if name in known) for n, names in plain["few_rows"].items()}
            found = tuple(
                Faster(of[:80], way[:80], usual[:80], float(ratio)) for of, way, usual, ratio in plain["found"]
            )
            text = "".join(word for each in found for word in each[:3])  # is printed
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            return None
        right = matmul in get_args(Precision) and isinstance(cached, bool) and text.isprintable()
        right = right and max(len(rows), len(found)) <= MOST
        return cls(matmul, dict(sorted(rows.items())), cached, found) if right else None


_used = Choice()
_asked: tuple[tuple[int, tuple[Implementation, ...]], ...] = ()


def use(choice: Choice, device_type: str = "cpu", stated: bool = False) -> None:
    """Multiply so in this process from now on.

    Args:
        choice: of this machine or another; ``medium`` that rounds to bf16 here is ``highest``
        device_type: of the device that computes; on any but a CPU only a stated precision has an effect
        stated: whether the user has written the precision, which is then set as it is
    """
    global _used, _asked
    if not stated and (device_type != "cpu" or (choice.matmul == "medium" and error_of_medium() >= FULL_FP32)):
        choice = replace(choice, matmul="highest")
    torch.set_float32_matmul_precision(choice.matmul)
    if not stated:  # "medium" is for the CPU; it would allow TF32 on a GPU
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    known, usual = implementations("linear"), chain("linear", None, "cpu", (0, 0))
    here = {name: each for name, each in known.items() if each.runs_on("cpu", (0, 0))}
    _asked = tuple(
        (rows, (*(here[name] for name in names if name in here), *usual))
        for rows, names in sorted(choice.few_rows.items())
    )
    _used = choice


def used() -> Choice:
    """How this process multiplies."""
    return _used


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Context in which this process multiplies so."""
    before, tf32 = _used, torch.backends.cuda.matmul.fp32_precision
    with matmul_precision(torch.get_float32_matmul_precision()):  # sets back what it finds
        use(choice)
        try:
            yield
        finally:
            use(before)
    torch.backends.cuda.matmul.fp32_precision = tf32


def asked_for(rows: int) -> tuple[Implementation, ...]:
    """The implementations of ``linear`` for so many rows on a CPU, torch's own last; none where none was chosen."""
    for most, asked in _asked:
        if rows <= most:
            return asked
    return ()


@functools.cache
def error_of_medium() -> float:
    """Relative error of a product under ``medium``, in the Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator, dtype=torch.float32) for _ in range(2))
    with matmul_precision("medium"):
        product = (a @ b).double()
    exact = a.double() @ b.double()
    return float((product - exact).norm() / exact.norm())


def multiplies_by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes a CPU's products of this precision, which compiles code for every new shape; else MKL."""
    return dtype.itemsize == 2 or (dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest")


def reads_fast(x: Tensor) -> bool:
    """Whether MKL reads a cache for such queries, where that was measured to be faster."""
    return _used.cached and is_plain(x)


def is_plain(x: Tensor) -> bool:
    """Whether x is fp32 on a CPU, without gradients, autocast or a compiler, so that its products can be redirected."""
    if torch.is_grad_enabled() or x.dtype != torch.float32 or not x.is_cpu:
        return False
    return not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())


@contextmanager
def by_mkl() -> Iterator[None]:
    """Context in which MKL computes fp32 products."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # what set_float32_matmul_precision sets too
    precision = products.fp32_precision
    products.fp32_precision = "ieee"
    try:
        yield
    finally:
        products.fp32_precision = precision


kernel("linear", "torch", order=20)(F.linear)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``; without gradients by the first chosen implementation that takes it.

    Args:
        x: [..., K]
        weight: [N,K]
        bias: [N]

    Returns:
        [..., N]
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if x.is_cpu and (asked := asked_for(x.numel() // (x.shape[-1] or 1))):
        return first_to_take(asked, x, weight, bias).call(x, weight, bias)
    return compute("linear", x, weight, bias)
