"""The check that every hyper-parameter has an effect: an ablation over one without effect is a false result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.conformance.alternatives import Node, valid
from blockwright.blocks.conformance.behaviour import states
from blockwright.blocks.conformance.construction import move_gates
from blockwright.blocks.conformance.setting import Setting, shown, tokens
from blockwright.blocks.conformance.verdict import ExemptError, PromiseError, must
from blockwright.blocks.decoder import Decoder
from blockwright.registry.schema import Parameter

MANY = 12  # values tried per parameter, alone
FEW = 5  # values tried per parameter, in pairs


def every_hyperparameter(setting: Setting) -> None:
    """For each parameter of the schema, children included, some other valid value changes the outputs, losses,
    gradients, state, parameter count or cache bytes. Values are tried alone, then together with another value of each
    other parameter: a limit on groups has an effect only where there are groups."""
    parameters = setting.entry.schema.parameters
    if not parameters:
        raise ExemptError("it has no parameters")
    usual = _trace(setting, setting.node())
    for p in parameters.values():
        if not _matters(setting, p, usual):
            found = any(True for _ in valid(setting, setting.node(), p))
            must(found, f"no other valid value of {p.name} was found: declare its values with Literal")
            must(False, f"{p.name} changes nothing, whatever its value")


def _matters(setting: Setting, p: Parameter, usual: list[Any]) -> bool:
    """Whether two values of it give different models, all else being equal.

    Args:
        setting: of the block
        p: the parameter
        usual: trace of the usual node
    """
    node = setting.node()
    for others, few in itertools.chain([(node, MANY)], ((beside, FEW) for beside in _beside(setting, node, p))):
        base = usual if others is node else _trace(setting, others)
        for value in itertools.islice(valid(setting, others, p), few):
            try:
                other = _trace(setting, {**others, p.name: value})
            except Exception as error:
                said = " ".join(str(error).split())
                raise PromiseError(f"with {p.name}={value}: {type(error).__name__}: {said[:400]}") from error
            if not _same(base, other):
                return True
    return False


def _beside(setting: Setting, usual: Node, p: Parameter) -> Iterator[Node]:
    """The usual node with another value of one other parameter: the first of each, then the second of each, …"""
    others = [q for q in setting.entry.schema.parameters.values() if q is not p]
    values = [[{**usual, q.name: v} for v in itertools.islice(valid(setting, usual, q), FEW)] for q in others]
    for rank in itertools.zip_longest(*values):
        yield from (node for node in rank if node is not None)


def _trace(setting: Setting, node: Mapping[str, Any]) -> list[Any]:
    """Everything in which two models may visibly differ."""
    decoder, ids = setting.decoder(node), tokens(2, 13)
    seen: list[Any] = [[tuple(p.shape) for p in decoder.parameters()], _cache_bytes(decoder), states(decoder, ids)]
    torch.manual_seed(0)
    given, media = shown(decoder, ids)
    decoder.begin_step(0)
    hidden, routings = decoder.train().hidden(given, media=media)
    losses = [x for r in routings if r is not None for x in r.losses.values()]
    torch.stack([decoder.nll(hidden, given.roll(-1, 1)), *losses]).sum().backward()
    seen += [hidden, *losses, *(p.grad.to_dense() for p in decoder.parameters() if p.grad is not None)]
    for _ in range(3):
        move_gates(decoder)
    return [*seen, *decoder.buffers(), states(decoder.eval(), ids)]


def _cache_bytes(decoder: Decoder) -> int | None:
    try:
        return sum(c.nbytes for c in decoder.new_caches(1, 64))
    except NotImplementedError:
        return None


def _same(one: list[Any], other: list[Any]) -> bool:
    """Whether two traces are equal. Non-finite values prove nothing, so they count as equal."""
    finite = all(bool(torch.isfinite(t).all()) for t in other if isinstance(t, Tensor) and t.is_floating_point())
    return not finite or (len(one) == len(other) and all(map(_equal, one, other)))


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other
