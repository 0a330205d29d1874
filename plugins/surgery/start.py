"""Surgery as a start: ``surgery=default init_from=RUN model/attention=mla``."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.precision import default_dtype
from blockwright.plugins.surgery.growth import Growth
from blockwright.plugins.surgery.ledger import Ledger
from blockwright.plugins.surgery.operating import Named, Step, build, changing, operate, plan
from blockwright.registry import ConfigError, register
from blockwright.registry.ranges import Count, Seed
from blockwright.training.checkpoints.resume import say
from blockwright.training.starts import Start, Text


@dataclass(frozen=True)
class Outline:
    """What a surgery will do, before there are weights.

    Args:
        grown: how the depth changes, in words
        steps: which operator makes each block
        changes: path of a block that will not be exact → why
    """

    grown: list[str]
    steps: Sequence[Step]
    changes: Mapping[str, str]

    @property
    def reads_text(self) -> bool:
        """Whether some operator learns from training text."""
        return any(step.operator is not None and step.operator.reads_inputs for step in self.steps)

    def report(self) -> list[str]:
        """Which operator makes what, and what surely changes; empty if nothing is made."""
        paths = defaultdict(list)
        for step in self.steps:
            paths[step.name, self.changes.get(step.path, "")].append(step.path)
        return self.grown + [
            f"{name}: {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "") + (why and f", {why}")
            for (name, why), found in paths.items()
            if name != "copy"
        ]


@register("start", "surgery")
class Surgery(Start):
    """Fills a model with the weights of a run of another composition, block by block (plugins/surgery/operating.py).

    Args:
        growth: where layers come from if there are more or fewer
        transplant: an operator that is preferred where it serves, by its name or with its options, or a list of them;
            null: the registered one that serves
        exact: whether to refuse a model that computes something else than the trained one: what no operator claims to
            keep, and what a measurement on random tokens shows to differ
        batches: batches of training text from which operators learn what their block reads
        init_from: the trained model
        seed: of what operators draw
    """

    derives = True
    default_children: ClassVar[Mapping[str, Any]] = {"growth": "zeroed"}

    def __init__(
        self,
        growth: Growth,
        transplant: str | dict[str, Any] | list[Any] | None = None,
        exact: bool = False,
        batches: Count = 8,
        init_from: str | None = None,
        seed: Seed = 0,
    ) -> None:
        listed = transplant if isinstance(transplant, list) else [] if transplant is None else [transplant]
        self.transplants, self.growth, self.exact, self.batches = listed, growth, exact, batches
        self.trained, self.seed = init_from, seed

    def recipe(self) -> list[Any]:
        return [self.transplants, type(self.growth).__qualname__, vars(self.growth), self.batches]

    def plan(self, old: Decoder, new: Decoder) -> list[Step]:
        """What will make each block; both decoders may be on the meta device.

        Raises:
            ConfigError: at ``surgery.transplant``
        """
        named: list[Named] = []
        for node in self.transplants:
            operator = build(node, "surgery.transplant")  # refuses a node without a name
            named.append((node["name"] if isinstance(node, Mapping) else node, operator))
        return plan(old, new, named, self.growth)

    def check(self, model: Mapping[str, Any]) -> list[str]:
        if self.trained is None:
            rule = "puts the weights of a trained model into another, and none is named"
            raise ConfigError("init_from", None, rule, "Name a run: init_from=RUN; or leave surgery out")
        return []

    def compare(self, there: Mapping[str, Any], here: Mapping[str, Any], allowed: bool) -> list[str]:
        lines = self.outline(there, here).report()
        return [f"surgery on {self.trained}; " + "; ".join(lines or ["nothing changes"])]

    def outline(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> Outline:
        """Plan without weights.

        Args:
            there: composition of the trained model
            here: that of the model to fill

        Raises:
            ConfigError: as ``plan``; or something surely changes, and must not
        """
        old, new = compose(there, device="meta"), compose(here, device="meta")
        steps = self.plan(old, new)
        changes = changing(old, new, steps)
        if self.exact:
            for path, why in changes.items():
                raise _inexact(f"{path} may compute something else ({why})")
        grown = [] if len(old.layers) == len(new.layers) else [f"{len(old.layers)} → {len(new.layers)} layers"]
        return Outline(grown, steps, changes)

    def fill(self, decoder: Decoder, text: Text) -> None:
        def report(old: Decoder, ledger: Ledger) -> None:
            say("\n  ".join([f"surgery on {self.trained}, measured on random tokens:", *ledger.report()]))

        self.operate(decoder, text, report)

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        rule = "needs whole blocks, and this strategy shards them"
        raise ConfigError("surgery", "default", rule, "Run blockwright surgery first, and start from its OUT")

    def operate(self, new: Decoder, text: Text, report: Callable[[Decoder, Ledger], None]) -> None:
        """Fill a decoder, initialised, in place, and measure what that changed.

        Args:
            new: the decoder, on the CPU; of lower precision, it is filled and measured in fp32, and then rounded
            text: gives batches of training text
            report: given the old decoder and the ledger, before anything is refused for it

        Raises:
            ConfigError: as ``plan``; a size does not suit an operator; or it is not exact and has to be
        """
        assert self.trained is not None
        with default_dtype(torch.float32), torch.no_grad():
            lowered = any(parameter.dtype != torch.float32 for parameter in new.parameters())
            old, full = load(self.trained), copy.deepcopy(new).to(torch.float32) if lowered else new
            steps = self.plan(old, full)
            ledger = operate(old, full, steps, self.growth, lambda: itertools.islice(text(), self.batches), self.seed)
            if lowered:
                new.load_state_dict(full.state_dict())
        report(old, ledger)
        if self.exact:
            refuse_inexact(ledger)


def refuse_inexact(ledger: Ledger) -> None:
    """Refuse a model that computes something else than the trained one, or that is too large to be compared with it.

    Raises:
        ConfigError: at ``surgery.exact``
    """
    if ledger.errors:
        raise _inexact(ledger.errors[0])
    for operation in ledger.operations:
        if not operation.claimed:
            why = f" ({operation.note})" if operation.note else ""
            raise _inexact(f"{operation.name} changes what {operation.path} computes{why}")
    if not ledger.exact:
        raise _inexact("the models are too large to be compared here, and what is not measured is not called exact")


def _inexact(rule: str) -> ConfigError:
    return ConfigError("surgery.exact", True, rule, "Write surgery.exact=false, or choose settings that lose nothing")
