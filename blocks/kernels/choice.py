"""Choice of kernel implementations: made when a decoder is built or moved, and shown in the cost card.

Every block holds a ``Kernels`` and computes through it. The automatic choice is by device, its compute capability, what
is installed, and at each call by what an implementation takes (blocks/kernels/seam.py); a configuration may name
another one (``task.kernels.experts=grouped``). All compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.kernels.coded_attention import Codes
from blockwright.blocks.kernels.cross_entropy import linear_cross_entropy
from blockwright.blocks.kernels.grouped_matmul import Choices
from blockwright.blocks.kernels.recurrence import one_by_one
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import (
    KERNELS,
    Implementation,
    capability_of,
    chain,
    compute,
    first_to_take,
    implementations,
)
from blockwright.registry import ConfigError, did_you_mean

AUTO = "auto"


@dataclass(frozen=True)
class Kernels:
    """The name of an implementation for each kernel; ``auto`` decides at every call, by the tensors' device.

    Args:
        attention: scaled-dot-product attention
        latent_attention: attention over latents that are not expanded
        coded_attention: attention to a quantised cache whose codes are read as they are
        recurrence: linear recurrences with decay, plain, with the delta rule, or erasing apart from writing
        encoder_attention: attention of all positions on all, in an encoder
        experts: the routed SwiGLU networks
        cross_entropy: loss from hidden states
        rms_norm: root-mean-square norm
        gated_silu: hidden layer of a dense SwiGLU
        rotation: of pairs of dimensions
        chains: kernel → what is asked in which order, where that is settled
    """

    attention: str = AUTO
    latent_attention: str = AUTO
    coded_attention: str = AUTO
    recurrence: str = AUTO
    encoder_attention: str = AUTO
    experts: str = AUTO
    cross_entropy: str = AUTO
    rms_norm: str = AUTO
    gated_silu: str = AUTO
    rotation: str = AUTO
    chains: Mapping[str, tuple[Implementation, ...]] = field(default_factory=dict, compare=False, repr=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
        """``blockwright.blocks.kernels.attention.causal_attention``."""
        return self._compute("attention", q, k, v, scoring)

    def attend_latents(
        self, q: Tensor, memory: Tensor, n_keys: int, latent: int, scale: float, bias: Tensor | None = None
    ) -> Tensor:
        """``blockwright.blocks.kernels.attention.latent_attention``."""
        return self._compute("latent_attention", q, memory, n_keys, latent, scale, bias)

    def attend_codes(self, q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> Tensor:
        """``blockwright.blocks.kernels.coded_attention.coded_attention``."""
        return self._compute("coded_attention", q, keys, values, scoring)

    def recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor | None = None,
        state: Tensor | None = None,
        segments: Tensor | None = None,
        erase: Tensor | None = None,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``blockwright.blocks.kernels.recurrence.recurrence``."""
        return self._compute("recurrence", q, k, v, decay, beta, state, segments, erase, at)

    def recur_each(self, *given: Any) -> tuple[Tensor, Tensor]:
        """``recurrence_each`` of blocks/kernels/recurrence.py, or one by one by a ``recurrence`` that is named."""
        device = given[0].device
        if self._asked("recurrence", device)[0] is _chain("recurrence", AUTO, device)[0]:
            return compute("recurrence_each", *given)
        return one_by_one(self.recur, *given)

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """``blockwright.blocks.kernels.attention.encoder_attention``."""
        return self._compute("encoder_attention", q, k, v, scale)

    def swiglu_experts(self, x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
        """``blockwright.blocks.kernels.grouped_matmul.swiglu_experts``."""
        return self._compute("experts", x, choices, gate_up, down)

    def nll_and_z(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None = None,
        z_loss: float = 0.0,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``blockwright.blocks.kernels.cross_entropy.linear_cross_entropy``; itself where tokens have ``weights``."""
        if weights is not None:  # the implementations of other packages need not take them
            return linear_cross_entropy(hidden, weight, targets, softcap, z_loss, weights=weights)
        return self._compute("cross_entropy", hidden, weight, targets, softcap, z_loss)

    def normalise(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``blockwright.blocks.kernels.elementwise.rms_norm``."""
        return self._compute("rms_norm", x, weight, eps)

    def gate_silu(self, gate: Tensor, up: Tensor) -> Tensor:
        """``blockwright.blocks.kernels.elementwise.gated_silu``."""
        return self._compute("gated_silu", gate, up)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """``blockwright.blocks.kernels.elementwise.rotate_pairs``."""
        return self._compute("rotation", x, cos, sin, interleaved)

    def attending_by(self, call: Callable[..., Tensor]) -> Kernels:
        """The same kernels, with another function for ``attend``."""
        other = Implementation("other", call, (), None, None, None, True, 0)
        return replace(self, chains={**self.chains, "attention": (other,)})

    def _compute(self, kernel: str, *given: Any) -> Any:
        return first_to_take(self._asked(kernel, given[0].device), *given).call(*given)

    def _asked(self, kernel: str, device: torch.device) -> tuple[Implementation, ...]:
        return self.chains.get(kernel) or _chain(kernel, getattr(self, kernel), device)

    def __deepcopy__(self, memo: Any) -> Kernels:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Kernels, tuple(getattr(self, kernel) for kernel in KERNELS)


def _chain(kernel: str, name: str, device: torch.device) -> tuple[Implementation, ...]:
    return chain(kernel, None if name == AUTO else name, device.type, capability_of(device))


def check(overrides: Mapping[str, Any], path: str) -> dict[str, str]:
    """Overrides of a configuration, as they are.

    Args:
        overrides: kernel → implementation, or ``auto``
        path: of the node, for error messages

    Raises:
        ConfigError: there is no such kernel or implementation, or it needs a package that is not installed
    """
    if not isinstance(overrides, Mapping):
        raise ConfigError(path, overrides, "maps kernels to implementations", f"Write {path}={{attention: sdpa}}")
    for kernel, name in overrides.items():
        if kernel not in KERNELS:
            raise ConfigError(f"{path}.{kernel}", name, "there is no such kernel", did_you_mean(kernel, KERNELS))
        found = implementations(kernel)
        known = (AUTO, *found)
        if name not in known:
            rule = f"{kernel} has no such implementation ({', '.join(known)})"
            raise ConfigError(f"{path}.{kernel}", name, rule, did_you_mean(str(name), known))
        if name != AUTO and not found[name].is_installed:
            rule = f"needs the package {found[name].needs}, which is not installed, and a GPU"
            raise ConfigError(f"{path}.{kernel}", name, rule, f"Install it, or write {path}.{kernel}=auto")
        if name != AUTO and (why := found[name].fault_here) is not None:
            raise ConfigError(f"{path}.{kernel}", name, why, f"Install that, or write {path}.{kernel}=auto")
    return dict(overrides)


def choose(
    device: torch.device, overrides: Mapping[str, str] | None = None, capability: tuple[int, int] | None = None
) -> Kernels:
    """What runs on a device.

    Args:
        device: where the weights are
        overrides: kernel → implementation, checked; one that does not run there is passed over
        capability: of the device; None asks it
    """
    least = capability_of(device) if capability is None else capability
    named = {kernel: name for kernel, name in (overrides or {}).items() if name != AUTO}
    chains = {kernel: chain(kernel, named.get(kernel), device.type, least) for kernel in KERNELS}
    return Kernels(**{kernel: asked[0].name for kernel, asked in chains.items()}, chains=chains)


def names(kernels: Kernels) -> dict[str, str]:
    """kernel → the implementations that are asked, in order: ``blocked, else sdpa``."""
    return {
        kernel: ", else ".join(i.name for i in kernels.chains.get(kernel, ())) or getattr(kernels, kernel)
        for kernel in KERNELS
    }
