"""Routed experts in a task: balance losses, loads to log, and updates of gates by what a step has counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from torch import Tensor, nn

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating, Routing
from blockwright.training.metrics import ExpertLoad
from blockwright.training.parallel.ranks import DataRanks

Routings = Sequence[Routing | None]


class RoutingLoads(nn.ModuleDict):
    """The loads of all experts: summed for logging by stage, and over the current optimizer step.

    Attributes:
        shares: layer → share of choices of each expert, [E], when last logged
    """

    def __init__(self) -> None:
        super().__init__()
        self.shares: dict[str, Tensor] = {}
        self._step: dict[str, tuple[Tensor, Tensor]] = {}  # the load, and what the gate's update takes

    def fill(self, decoder: Decoder, stages: Sequence[str]) -> None:
        """Create a metric for each layer that routes. Those of multi-token prediction route in training only."""
        gates = gates_of(decoder)
        for stage in stages:
            layers = [k for k in gates if stage == "train" or int(k) < len(decoder.layers)]
            loads = {k: ExpertLoad(gates[k].n_experts, stage == "train") for k in layers}
            self[f"{stage}_load"] = nn.ModuleDict(loads)

    def add(self, stage: str, routings: Routings, decoder: Decoder) -> None:
        """Add the loads of a batch to the logged ones."""
        for layer, load in loaded(routings, decoder):
            self._metrics(stage)[layer].update(load)

    def add_to_step(self, routings: Routings, decoder: Decoder) -> None:
        """Add the loads of a training micro-batch to those of the step."""
        for layer, routing in routed(routings, decoder):
            if len(routing.load):
                load, counted = self._step.get(layer, (0, 0))
                self._step[layer] = load + routing.load, counted + routing.counted

    def end_step(self, decoder: Decoder, ranks: DataRanks, stepped: bool) -> None:
        """Log the loads of the step; if it was taken, update every trained gate by what all ranks counted."""
        for layer, (load, _) in self._step.items():
            self._metrics("train")[layer].update(load)
        for layer, gate in gates_of(decoder).items():
            if layer in self._step and stepped and is_trained(gate):
                gate.update(ranks.sum(self._step[layer][1]))
        self.forget_step()

    def forget_step(self) -> None:
        self._step.clear()

    def figures(self, stage: str) -> dict[str, Tensor]:
        """The figures of a stage since the last call, by name; resets them."""
        figures: dict[str, Tensor] = {}
        for layer, metric in self._metrics(stage).items():
            values = metric.compute()
            self.shares[layer] = values.pop("shares").float().cpu()
            figures |= {f"{stage}_load/layer{layer}/{name}": value.float() for name, value in values.items()}
            metric.reset()
        return figures

    def reset(self, stage: str) -> None:
        for metric in self._metrics(stage).values():
            metric.reset()

    def _metrics(self, stage: str) -> dict[str, ExpertLoad]:
        return cast(dict[str, ExpertLoad], dict(cast(nn.ModuleDict, self[f"{stage}_load"]).items()))


def gates_of(decoder: Decoder) -> dict[str, Gating]:
    """Index of each layer that routes → its gate; layers of multi-token prediction follow the others."""
    found = {}
    for i, layer in enumerate([*decoder.layers, *(depth.layer for depth in decoder.mtp)]):
        gates = [m for m in layer.modules() if isinstance(m, Gating)]
        if gates:
            found[str(i)] = gates[0]
    return found


def is_trained(gate: Gating) -> bool:
    """Whether any of its parameters is trained, or it has none."""
    parameters = list(gate.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


def routed(routings: Routings, decoder: Decoder) -> Iterator[tuple[str, Routing]]:
    """Index of the layer and routing, of each visit of a layer that routed, or has losses."""
    further = range(len(decoder.layers), len(decoder.layers) + len(decoder.mtp))
    layers = [*decoder.order(cached=False), *further]
    return ((str(layers[i]), routing) for i, routing in enumerate(routings) if routing is not None)


def loaded(routings: Routings, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Index and load of each layer that routed; some have losses of an attention only."""
    return ((layer, routing.load) for layer, routing in routed(routings, decoder) if len(routing.load))


def balance_losses(routings: Routings, decoder: Decoder) -> dict[str, Tensor]:
    """The balance losses of a micro-batch, and those of attentions, summed over layers and their visits, by name.

    A layer of which nothing is trained adds none: its loss could only move what comes before it, such as an input, to
    suit routes that are fixed.
    """
    losses: dict[str, Tensor] = {}
    layers = [*decoder.layers, *(depth.layer for depth in decoder.mtp)]
    for i, routing in routed(routings, decoder):
        if any(p.requires_grad for p in layers[int(i)].parameters()):
            for name, value in routing.losses.items():
                losses[name] = losses.get(name, 0) + value
    return losses
