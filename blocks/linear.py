"""The linear layer of every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block, Placement
from blockwright.blocks.kernels.products import linear

_maker: ContextVar[Callable[..., nn.Linear] | None] = ContextVar("maker", default=None)


@contextmanager
def linears(make: Callable[..., nn.Linear]) -> Iterator[None]:
    """Inside, every linear layer of a block that is built comes from ``make``: from a library of low-precision layers.

    Args:
        make: given the arguments of ``torch.nn.Linear``; what it returns has ``weight`` [out,in] and ``bias``, by which
            it is initialised, split, and saved. The loss and absorbed decoding (MLA) read the weight and call nothing
    """
    token = _maker.set(make)
    try:
        yield
    finally:
        _maker.reset(token)


class Linear(nn.Linear):
    """``torch.nn.Linear`` with faster decoding on some processors: see blocks/kernels/products.py."""

    def __new__(cls, in_features: int = 0, out_features: int = 0, bias: bool = True) -> nn.Linear:  # type: ignore[misc]
        make = _maker.get()
        return super().__new__(cls) if make is None or not in_features else make(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # where there is nothing to draw, and drawing it takes most of a model's assembly
            super().reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


# --- adapters of low rank (LoRA): W becomes W + s · B A, of which A and B alone are trained ---------------------------


A, B = "_lora_a", "_lora_b"  # after the name of the adapted parameter


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return name.endswith((A, B))


def adaptable(decoder: nn.Module) -> list[str]:
    """Names of the parameters that can have an adapter: matrices of linear layers, and stacks of experts."""
    found = []
    for path, module in decoder.named_modules():
        leaves = ["weight"] if type(module) in (Linear, nn.Linear) else []
        if isinstance(module, Block):
            own = dict(module.named_parameters(recurse=False))
            leaves = [
                n for n, how in module.parallel_plan().items() if how == "expert" and n in own and own[n].ndim == 3
            ]
        found += [f"{path}.{leaf}" for leaf in leaves]
    return found


def attach(decoder: nn.Module, names: Sequence[str], rank: int, scale: float) -> None:
    """Freeze a decoder, and add adapters without values.

    Args:
        names: of adaptable parameters
        rank: r
        scale: s
    """
    decoder.requires_grad_(False)
    for name in names:
        path, _, leaf = name.rpartition(".")
        module: Any = decoder.get_submodule(path)
        weight = module._parameters[leaf]
        *stack, out, width = weight.shape
        for suffix, shape in ((A, (*stack, rank, width)), (B, (*stack, out, rank))):
            module.register_parameter(leaf + suffix, nn.Parameter(weight.new_empty(shape)))
        module.lora_scale, module.lora_on = scale, True
        cls: Any = type(module)
        module.__class__ = _adapted(cls, leaf)


def initial_std(name: str, parameter: Tensor) -> float | None:
    """Standard deviation of a new adapter's draws; None for other parameters.

    That of A is 1/√(3·in), as of the paper's released code; B is 0.
    """
    return 0.0 if name.endswith(B) else (3 * parameter.shape[-1]) ** -0.5 if name.endswith(A) else None


@contextmanager
def switched_off(decoder: nn.Module) -> Iterator[None]:
    """Context in which a decoder computes as its base."""
    adapted: list[Any] = [module for module in decoder.modules() if hasattr(module, "lora_on")]
    try:
        for module in adapted:
            module.lora_on = False
        yield
    finally:
        for module in adapted:
            module.lora_on = True


def merged(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Tensors by name with the adapters among them added to their matrices, in at least fp32."""
    found = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    for name in (n.removesuffix(A) for n in tensors if n.endswith(A)):
        weight = found[name]
        w, a, b = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight, *_pair(tensors, name)))
        found[name] = (w + scale * (b @ a)).to(weight.dtype)
    return found


def _pair(tensors: Mapping[str, Any], name: str) -> tuple[Tensor, Tensor]:
    return tensors[name + A], tensors[name + B]


@cache
def _adapted(cls: type[nn.Module], leaf: str) -> type[nn.Module]:
    """A class like ``cls`` whose parameter ``leaf`` reads as adapted; parameters keep their names and places."""

    def read(module: Any) -> Tensor:
        held = module._parameters
        if not module.lora_on or hasattr(held[leaf], "device_mesh"):  # sharded: FSDP looks for what it manages
            return held[leaf]
        a, b = _pair(held, leaf)
        return held[leaf] + module.lora_scale * (b @ a)

    def forward(module: Any, input: Tensor) -> Tensor:
        held = module._parameters
        y = linear(input, held["weight"], held["bias"])
        if not module.lora_on:
            return y
        a, b = _pair(held, leaf)
        return y + module.lora_scale * F.linear(F.linear(input, a), b)

    members: dict[str, Any] = {leaf: property(read)}
    return type(cls.__name__, (cls,), members | ({"forward": forward} if issubclass(cls, nn.Linear) else {}))


# --- how parallel training splits a parameter -------------------------------------------------------------------------


def placement(name: str, plans: Mapping[str, Placement]) -> Placement:
    """The placement of a parameter.

    An adapter's A [r,in] is split with a matrix's inputs, its B [out,r] with the outputs.

    Args:
        name: of the parameter
        plans: of all blocks (``parallel_plan``), by the names of parameters
    """
    if not is_adapter(name):
        return plans.get(name, "replicate")
    outputs = name.endswith(B)
    whole = plans.get(name.removesuffix(B if outputs else A), "replicate")
    return whole if whole == "expert" or whole == ("column" if outputs else "row") else "replicate"
