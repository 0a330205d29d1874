"""The contract of ``loop``: which layers a pass visits again, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor

from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.entry import Entry
from blockwright.blocks.exit import Exit
from blockwright.blocks.visit_draw import MOST, VisitDraw
from blockwright.registry import BlockError, family, register
from blockwright.registry.layout import MAX_LAYERS
from blockwright.registry.ranges import Count
from blockwright.registry.schema import conforms, fault

Core = tuple[int, ...]  # indices of layers that are visited one after the other
Visit = Callable[[Tensor, int], Tensor]  # the stream and the index of a layer → the stream after this layer
Visits = Annotated[int, Ge(1), Le(MOST)]
Index = Annotated[int, Ge(-MAX_LAYERS), Lt(MAX_LAYERS)]


@family("loop", in_layers=False)
class Loop(Block):
    """Layers ``first`` to ``last`` of a decoder are visited ``visits`` times: prelude (core)*r coda.

    A visit is computed as another layer with the same weights would be: it has a cache and a routing of its own, and
    passes on what crosses depth. So parameters count once, FLOPs and caches r times. A block of this kind says by
    ``cores`` in which order; ``entry`` says what a visit reads. In training ``visit_draw`` chooses r for each step;
    elsewhere it is ``visits``. Layers of multi-token prediction are not visited again.

    Context: ``n_layers`` of the model.

    Args:
        entry: what enters each visit
        first: index of the first layer that is visited again; a negative number counts from the end
        last: index of the last one, which may be the same
        visits: r, of each of these layers in a pass
        visit_draw: how many visits a training step makes; null: ``visits``
        gradient_visits: the last visits that gradients pass through, which bounds the memory of training; null: all.
            8 in Huginn. It needs an ``entry`` that injects
        exit: chooses for each token after which visit it leaves; null: after the last. The core must then be the end
            of the model
    """

    counted_as: ClassVar[str | None] = "loop"
    default_children: ClassVar[Mapping[str, Any]] = {"entry": {"name": "plain"}}
    conformance_settings: ClassVar[Mapping[str, Any]] = {"first": -1, "visits": 3}

    def __init__(
        self,
        n_layers: int,
        entry: Entry,
        first: Index = 0,
        last: Index = -1,
        visits: Visits = 4,
        visit_draw: VisitDraw | None = None,
        gradient_visits: Count | None = None,
        exit: Exit | None = None,
    ) -> None:
        super().__init__()
        self.n_layers, self.visits, self.gradient_visits = n_layers, visits, gradient_visits
        start, end = _layer("first", first, n_layers), _layer("last", last, n_layers)
        if start > end:
            rule = f"is layer {end}, before first, which is layer {start}"
            raise BlockError("last", last, rule, "Name two layers in order, e.g. first: 2, last: 5")
        self.looped = range(start, end + 1)
        self.entry, self.visit_draw, self.exit = entry, visit_draw, exit
        if exit is not None and (end + 1 < n_layers or len(self.cores()) > 1):
            rule = "needs a loop that ends the model: layers behind it would be computed for every visit"
            raise BlockError("exit", type(exit).__name__, rule, "Leave it out, or write name: cycle and last: -1")
        if gradient_visits is not None and not entry.injects:
            rule = f"cuts the layers before the loop off from the loss: entry {type(entry).__name__} reads it once"
            raise BlockError("gradient_visits", gradient_visits, rule, "Leave it out, or write entry: adapter or add")
        self.drawn_visits = visits  # until the first step begins

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"visits": known["visits"]}

    def cores(self) -> list[Core]:
        """The parts of ``looped``, each of which is visited again as a whole before the next begins."""
        raise NotImplementedError

    def begin_step(self, seed: int) -> None:
        """Draw the visits of the training step that begins.

        Args:
            seed: the same on all ranks, which compute the same layers
        """
        self.drawn_visits = self.visits if self.visit_draw is None else self.visit_draw.visits_of(seed)

    def order(self, visits: int) -> list[int]:
        """The index of each layer that a pass with so many visits computes, in order."""
        return [index for core, times in self._parts(visits) for index in core * times]

    def with_visits(self, visits: int) -> Loop:
        """This block with other ``visits``; it shares every weight.

        Raises:
            BlockError: out of range
        """
        if not conforms(visits, Visits):
            raise BlockError("visits", visits, fault(visits, Visits), f"Write a number from 1 to {MOST}")
        other = copy.copy(self)
        other.visits = visits
        if other.visit_draw is None:
            other.drawn_visits = visits
        return other

    def forward(self, x: Tensor, visits: int, visit: Visit, norm: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The stream x of the first layer → those after each visit from which tokens may leave, the last one last.

        Args:
            visits: of each core
            visit: computes a layer
            norm: of the decoder, after its last layer
        """
        states = []
        for core, times in self._parts(visits):
            if core[0] not in self.looped:
                x = visit(x, core[0])
                continue
            entered = x
            for n in range(times):
                with torch.set_grad_enabled(torch.is_grad_enabled() and self._learns(n, times)):
                    x = self.entry(x, entered, n, norm)
                    for index in core:
                        x = visit(x, index)
                states.append(x)
            x = self.entry.leave(x, norm)
        return states if self.exit is not None else [x]

    def _learns(self, n: int, times: int) -> bool:
        return self.gradient_visits is None or n >= times - self.gradient_visits

    def _parts(self, visits: int) -> list[tuple[Core, int]]:
        """All layers in order: single ones, and cores with their visits."""
        before = [((i,), 1) for i in range(self.looped.start)]
        after = [((i,), 1) for i in range(self.looped.stop, self.n_layers)]
        return [*before, *((core, visits) for core in self.cores()), *after]

    def drawn(self) -> Drawn:
        layers = (
            f"layers {self.looped.start} to {self.looped[-1]}" if len(self.looped) > 1 else f"layer {self.looped[0]}"
        )
        return Drawn((layers, f"{self.visits} visits"))


def _layer(name: str, index: int, n_layers: int) -> int:
    if not -n_layers <= index < n_layers:
        rule = f"the model has layers 0 to {n_layers - 1}"
        raise BlockError(name, index, rule, "Name one of these, or a negative number, which counts from the end")
    return index % n_layers


@register("loop", "cycle")
class Cycle(Loop):
    """The layers are one core, which is visited as a whole: 0 (1 2)*3 3 is 0 1 2 1 2 1 2 3.

    Universal Transformer, arXiv 1807.03819; Huginn, arXiv 2502.05171; Ouro, arXiv 2510.25741, whose core is the whole
    model. Bae et al. 2025 (mixture of recursions), arXiv 2507.10524, call it cycle, and middle-cycle with a prelude and
    a coda.
    """

    def cores(self) -> list[Core]:
        return [tuple(self.looped)]


@register("loop", "repeat")
class Repeat(Loop):
    """Each layer is a core of its own: with 3 visits of layers 1 and 2, a pass is 0 1 1 1 2 2 2 3.

    Bae et al. 2025 (mixture of recursions), arXiv 2507.10524, call it sequence. The shared adjacent blocks of Liu et
    al. 2024 (MobileLLM), arXiv 2402.14905, are this with two visits. ``entry`` is one block for all cores.
    """

    def cores(self) -> list[Core]:
        return [(index,) for index in self.looped]
