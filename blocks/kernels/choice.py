"""Which implementation computes each kernel: chosen once, when a decoder is built or moved, and shown in the cost card.

Every block holds a ``Kernels`` and computes through it. The automatic choice is by device, dtype and what is installed;
a configuration may name another one (``task.kernels.experts=grouped``). All compute the same.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from blocks.kernels import elementwise
from blocks.kernels.attention import (
    causal_attention,
    causal_attention_on_cpu,
    causal_attention_on_gpu,
    causal_attention_reference,
)
from blocks.kernels.cross_entropy import (
    liger_cross_entropy_and_z,
    linear_cross_entropy_and_z,
    linear_cross_entropy_reference_and_z,
)
from blocks.kernels.grouped_matmul import Order
from blocks.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_reference
from registry import ConfigError, did_you_mean

AUTO = "auto"
Implementation = Callable[..., Any]

IMPLEMENTATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "attention": {
        "sdpa": causal_attention,
        "blocked": causal_attention_on_cpu,
        "flex": causal_attention_on_gpu,
        "reference": causal_attention_reference,
    },
    "experts": {"segments": grouped_swiglu, "grouped": grouped_swiglu_reference},
    "cross_entropy": {
        "chunked": linear_cross_entropy_and_z,
        "liger": liger_cross_entropy_and_z,  # never by itself: see its docstring
        "reference": linear_cross_entropy_reference_and_z,
    },
    "rms_norm": {"fused": elementwise.rms_norm, "torch": elementwise.rms_norm_torch},
    "gated_silu": {"fused": elementwise.gated_silu, "torch": elementwise.gated_silu_reference},
}


@dataclass(frozen=True)
class Kernels:
    """The name of an implementation for each kernel; ``auto`` decides anew at every call, by the tensors' device.

    Args:
        attention: scaled-dot-product attention
        experts: the routed SwiGLU networks
        cross_entropy: loss from hidden states
        rms_norm: root-mean-square norm
        gated_silu: hidden layer of a dense SwiGLU
    """

    attention: str = AUTO
    experts: str = AUTO
    cross_entropy: str = AUTO
    rms_norm: str = AUTO
    gated_silu: str = AUTO

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        bias: Tensor | None = None,
        segments: Tensor | None = None,
        window: int | None = None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """``blocks.kernels.attention.causal_attention``."""
        run = self._of("attention", q.device)
        return run(q, k, v, scale=scale, bias=bias, segments=segments, window=window, sinks=sinks, softcap=softcap)

    def swiglu_experts(self, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
        """``blocks.kernels.grouped_swiglu.grouped_swiglu``."""
        return self._of("experts", x.device)(x, weights, gate_up, down, order)

    def nll_and_z(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``blocks.kernels.cross_entropy.linear_cross_entropy_and_z``."""
        return self._of("cross_entropy", hidden.device)(hidden, weight, targets, softcap, z_loss=z_loss)

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``blocks.kernels.elementwise.rms_norm``."""
        return self._of("rms_norm", x.device)(x, weight, eps)

    def gate_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        """``blocks.kernels.elementwise.gated_silu``."""
        return self._of("gated_silu", gate.device)(gate, up)

    def _of(self, kernel: str, device: torch.device) -> Implementation:
        name: str = getattr(self, kernel)
        compiling = torch.compiler.is_compiling()
        if name == AUTO or (compiling and name in BY_HAND):
            name = best(kernel, "compiler" if compiling else device.type)
        return IMPLEMENTATIONS[kernel][name]


EXTRAS = {"liger": "liger_kernel"}  # implementation → package, of those that an extra of their name brings
KERNELS = tuple(f.name for f in fields(Kernels))
BY_HAND = {"segments", "fused", "blocked"}  # what the compiler writes better itself


def best(kernel: str, where: str) -> str:
    """The automatic choice on a type of device, or ``compiler``: what runs under torch.compile, on any."""
    if where == "cpu":
        by_hand = {"attention": "blocked", "experts": "segments", "rms_norm": "fused", "gated_silu": "fused"}
        return by_hand.get(kernel, _first(kernel))
    attention = "flex" if where == "cuda" else "sdpa"
    elsewhere = {"attention": attention, "experts": "grouped", "rms_norm": "torch", "gated_silu": "torch"}
    return elsewhere.get(kernel, _first(kernel))


def _first(kernel: str) -> str:
    return next(iter(IMPLEMENTATIONS[kernel]))


def check(wishes: Mapping[str, Any], path: str) -> dict[str, str]:
    """Wishes of a configuration, as they are.

    Args:
        wishes: kernel → implementation, or ``auto``
        path: of the node, for messages

    Raises:
        ConfigError: there is no such kernel or implementation
    """
    for kernel, name in wishes.items():
        if kernel not in KERNELS:
            raise ConfigError(f"{path}.{kernel}", name, "there is no such kernel", did_you_mean(kernel, KERNELS))
        known = (AUTO, *IMPLEMENTATIONS[kernel])
        if name not in known:
            rule = f"{kernel} has no such implementation ({', '.join(known)})"
            raise ConfigError(f"{path}.{kernel}", name, rule, did_you_mean(str(name), known))
        if name in EXTRAS and importlib.util.find_spec(EXTRAS[name]) is None:
            rule = f"needs the package {EXTRAS[name]}, which is not installed, and a GPU"
            raise ConfigError(f"{path}.{kernel}", name, rule, f"pip install 'blockwright[{name}]'")
    return dict(wishes)


def choose(device: torch.device, wishes: Mapping[str, str] | None = None) -> Kernels:
    """What runs on a device.

    Args:
        device: where the weights are
        wishes: kernel → implementation, checked
    """
    wanted = {kernel: name for kernel, name in (wishes or {}).items() if name != AUTO}
    return Kernels(**{kernel: wanted.get(kernel) or best(kernel, device.type) for kernel in KERNELS})


def names(kernels: Kernels) -> dict[str, str]:
    """kernel → implementation."""
    return asdict(kernels)
