"""Choice of kernel implementations: made when a decoder is built or moved, and shown in the cost card.

Every block computes through a ``Kernels``. The automatic choice depends on device, dtype and installed packages; a
configuration may override it (``task.kernels.experts=grouped``). All implementations compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from blocks.kernels import attention, cross_entropy, elementwise, experts, rotary
from blocks.kernels.experts import Choices
from blocks.kernels.scoring import Scoring
from registry import ConfigError, did_you_mean
from registry.extras import require

AUTO = "auto"
Implementation = Callable[..., Any]

IMPLEMENTATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "attention": {
        "sdpa": attention.causal_attention,
        "blocked": attention.causal_attention_on_cpu,
        "flex": attention.causal_attention_on_gpu,
        "reference": attention.causal_attention_reference,
    },
    "experts": {"segments": experts.swiglu_experts_on_cpu, "grouped": experts.swiglu_experts},
    "cross_entropy": {
        "chunked": cross_entropy.linear_cross_entropy,
        "liger": cross_entropy.liger_cross_entropy,  # never chosen automatically: see its docstring
        "reference": cross_entropy.linear_cross_entropy_reference,
    },
    "rms_norm": {"fused": elementwise.rms_norm, "torch": elementwise.rms_norm_torch},
    "gated_silu": {"fused": elementwise.gated_silu, "torch": elementwise.gated_silu_reference},
    "rotation": {"fused": rotary.rotate_pairs, "torch": rotary.rotate_pairs_reference},
}
EXTRAS = {"liger": "liger_kernel"}  # implementation → package, installed by the extra with its name
BY_HAND = {"fused"}  # left to the compiler when compiling


@dataclass(frozen=True)
class Kernels:
    """Implementation names by kernel; ``auto`` decides at every call, by the tensors' device.

    Args:
        attention: scaled-dot-product attention
        experts: the routed SwiGLU networks
        cross_entropy: loss from hidden states
        rms_norm: root-mean-square norm
        gated_silu: hidden layer of a dense SwiGLU
        rotation: of pairs of dimensions
    """

    attention: str = AUTO
    experts: str = AUTO
    cross_entropy: str = AUTO
    rms_norm: str = AUTO
    gated_silu: str = AUTO
    rotation: str = AUTO

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """``blocks.kernels.attention.causal_attention``."""
        return self._of("attention", q.device)(q, k, v, scoring)

    def swiglu_experts(self, x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
        """``blocks.kernels.experts.swiglu_experts``."""
        return self._of("experts", x.device)(x, choices, gate_up, down)

    def nll_and_z(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, z_loss: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """``blocks.kernels.cross_entropy.linear_cross_entropy``."""
        return self._of("cross_entropy", hidden.device)(hidden, weight, targets, softcap, z_loss=z_loss)

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``blocks.kernels.elementwise.rms_norm``."""
        return self._of("rms_norm", x.device)(x, weight, eps)

    def gate_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        """``blocks.kernels.elementwise.gated_silu``."""
        return self._of("gated_silu", gate.device)(gate, up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """``blocks.kernels.rotary.rotate_pairs``."""
        return self._of("rotation", x.device)(x, cos, sin, interleaved)

    def _of(self, kernel: str, device: torch.device) -> Implementation:
        name: str = getattr(self, kernel)
        if name == AUTO:
            name = getattr(best(device.type), kernel)
        if name in BY_HAND and torch.compiler.is_compiling():
            name = getattr(ELSEWHERE, kernel)
        return IMPLEMENTATIONS[kernel][name]


KERNELS = tuple(f.name for f in fields(Kernels))
ELSEWHERE = Kernels("sdpa", "grouped", "chunked", "torch", "torch", "torch")
BEST = {
    "cpu": Kernels("blocked", "segments", "chunked", "fused", "fused", "fused"),
    "cuda": Kernels("flex", "grouped", "chunked", "torch", "torch", "torch"),
}


def best(device_type: str) -> Kernels:
    """The automatic choice for a type of device."""
    return BEST.get(device_type, ELSEWHERE)


def check(overrides: Mapping[str, Any], path: str) -> dict[str, str]:
    """Validate the overrides of a configuration, and return them.

    Args:
        overrides: kernel → implementation, or ``auto``
        path: of the node, for error messages

    Raises:
        ConfigError: there is no such kernel or implementation
    """
    for kernel, name in overrides.items():
        if kernel not in KERNELS:
            raise ConfigError(f"{path}.{kernel}", name, "there is no such kernel", did_you_mean(kernel, KERNELS))
        known = (AUTO, *IMPLEMENTATIONS[kernel])
        if name not in known:
            rule = f"{kernel} has no such implementation ({', '.join(known)})"
            raise ConfigError(f"{path}.{kernel}", name, rule, did_you_mean(str(name), known))
        if name in EXTRAS:
            require(name, EXTRAS[name], path=f"{path}.{kernel}", value=name, otherwise="which needs a GPU")
    return dict(overrides)


def choose(device: torch.device, overrides: Mapping[str, str] | None = None) -> Kernels:
    """The kernels for a device.

    Args:
        device: where the weights are
        overrides: kernel → implementation, validated
    """
    return replace(best(device.type), **{k: name for k, name in (overrides or {}).items() if name != AUTO})


def names(kernels: Kernels) -> dict[str, str]:
    """kernel → implementation."""
    return asdict(kernels)
