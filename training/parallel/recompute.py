"""Activation checkpointing: activations are dropped in the forward pass and recomputed for the gradient.

``full``: a layer keeps only its input. ``selective``: feed-forward blocks keep only their input, since they have most
of a layer's activations and cost only their products; attention, whose cost grows quadratically with the length, keeps
what it computed. Tokens sent to experts are sent once more.

What a block decides by its scores it decides once: which experts a token goes to, which tokens a layer takes. A second
pass may round otherwise, and a near tie would then choose otherwise: gradients would be those of experts that the loss
never saw. So a block's ``decides`` is called in the forward pass alone. What it returned is stored, with what its
gradient needs: with one balance loss about 1.2 numbers in fp32 for each token and expert, 333 bytes a token of 64
experts, beside the 4,096 of a layer's input of 2,048 channels in bf16. Products with the states are recomputed.

Selectors of keys choose again: what they choose is as large as the scores, T × S.

Not supported: torch's selection by operator, which keeps results that this project's kernels modify in place. Compiled
layers have no such kernels, and there it keeps what ``topk`` and sorts found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    get_device_states,
    set_device_states,
)

from blockwright.blocks.base import Block
from blockwright.blocks.layer import Layer
from blockwright.registry import ConfigError

Recompute = Literal["none", "selective", "full"]
CHOOSE = {torch.ops.aten.topk.default, torch.ops.aten.sort.default, torch.ops.aten.sort.stable}


def check(value: Any) -> None:
    """Refuse an unknown kind of activation checkpointing.

    Raises:
        ConfigError
    """
    if value not in get_args(Recompute):
        rule = f"must be one of {', '.join(get_args(Recompute))}"
        remedy = "selective recomputes feed-forward blocks, full everything"
        raise ConfigError("task.activation_checkpointing", value, rule, remedy)


def recompute(part: nn.Module, how: Recompute) -> None:
    """Make the layers in a part of a decoder, or a layer of an input, recompute activations in the backward pass."""
    layers: list[Any] = [m for m in part.modules() if isinstance(m, Layer)]
    for layer in layers or [part]:
        if how == "full":
            _forget(layer)
        elif how == "selective" and isinstance(
            getattr(layer, "ffn", None), nn.Module
        ):  # an input of a plug-in may have none
            _forget(layer.ffn)


def _forget(module: nn.Module) -> None:
    inner, decisions = module.forward, Decisions()
    for block in module.modules():
        if isinstance(block, Block) and block.decides is not None:
            setattr(block, block.decides, partial(decisions.once, getattr(block, block.decides)))

    def forward(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*arguments, **options)
        passes = _compiled if torch.compiler.is_compiling() else decisions.passes
        return checkpoint(inner, *arguments, use_reentrant=False, context_fn=passes, **options)

    module.forward = forward


class Decisions:
    """What the blocks of a module decide, in the order of their calls: made in one pass, found in those after it."""

    def __init__(self) -> None:
        self.made: list[Any] | None = None  # of the pass that runs; None outside of such passes
        self.found: Iterator[Any] | None = None  # in a further pass

    def passes(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a forward pass and of its recomputation, which may be entered several times."""
        made: list[Any] = []
        return _Pass(self, made, again=False), _Pass(self, made, again=True)

    def once(self, decide: Any, *given: Any, **named: Any) -> Any:
        """What ``decide`` returns, or returned in the forward pass. Random draws after it are those of that pass."""
        if self.made is None:
            return decide(*given, **named)
        if self.found is None:
            # Detached, or an operation that saves what it returned would keep itself alive.
            with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
                result = decide(*given, **named)
            self.made.append((tree_map_only(Tensor, _leaf, result), torch.get_rng_state(), get_device_states(*given)))
            return result
        result, drawn, on_device = next(self.found)
        torch.set_rng_state(drawn)
        set_device_states(*on_device)
        return tree_map_only(Tensor, _leaf, result)


class _Pass(AbstractContextManager[None]):
    def __init__(self, decisions: Decisions, made: list[Any], again: bool) -> None:
        self.decisions, self.made, self.again = decisions, made, again

    def __enter__(self) -> None:
        self.decisions.made, self.decisions.found = self.made, iter(self.made) if self.again else None

    def __exit__(self, *error: object) -> None:
        self.decisions.made = self.decisions.found = None


def _leaf(tensor: Tensor) -> Tensor:
    """The same numbers, with a gradient where the tensor has one: operations then save what they saved before."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _compiled() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *given: Any, **named: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in CHOOSE else CheckpointPolicy.PREFER_RECOMPUTE
