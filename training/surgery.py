"""Surgery as configuration: ``surgery=default init_from=RUN model/attention=mla``."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import registry
from registry import ConfigError, Node, Scope
from registry.enforcing import enforced
from registry.ranges import Count

if TYPE_CHECKING:
    from torch import Tensor

    from blocks.decoder import Decoder
    from blocks.growth.base import Growth
    from blocks.surgery import Named, Operation, Step


@enforced("surgery")
class Surgery:
    """Fills a model with the weights of a run of another composition, block by block (blocks/surgery.py).

    Args:
        transplant: an operator that is preferred where it serves, by its name or with its options, or a list of them;
            null: the registered one that serves
        growth: where layers come from if there are more or fewer
        exact: whether to refuse operators that change what the model computes
        batches: batches of training text from which operators learn what their block reads
    """

    def __init__(
        self,
        transplant: str | dict[str, Any] | list[Any] | None = None,
        growth: str | dict[str, Any] = "zeroed",
        exact: bool = False,
        batches: Count = 8,
    ) -> None:
        listed = transplant if isinstance(transplant, list) else [] if transplant is None else [transplant]
        self.transplants, self.exact, self.batches = listed, exact, batches
        self.growth: Growth = registry.build("growth", Node(growth, "surgery.growth"), Scope({}, {}))

    def record(self) -> list[Any]:
        """What decides the weights that it makes, as plain types."""
        return [self.transplants, type(self.growth).__qualname__, vars(self.growth), self.batches]

    def plan(self, old: Decoder, new: Decoder) -> list[Step]:
        """What will make each block; both decoders may be on the meta device.

        Raises:
            ConfigError: at ``surgery.transplant``
        """
        from blocks.surgery import build, plan

        named: list[Named] = []
        for node in self.transplants:
            name = node["name"] if isinstance(node, Mapping) else node
            named.append((name, build(node, "surgery.transplant")))
        return plan(old, new, named, self.growth)

    def check(self, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
        """Plan without weights, and say which operator makes what.

        Args:
            there: composition of the trained model
            here: that of the model to fill

        Raises:
            ConfigError: as ``plan``
        """
        from blocks.compose import compose

        old, new = compose(there, device="meta"), compose(here, device="meta")
        paths = defaultdict(list)
        for step in self.plan(old, new):
            paths[step.name].append(step.path)
        grown = [] if len(old.layers) == len(new.layers) else [f"{len(old.layers)} → {len(new.layers)} layers"]
        return grown + [
            f"{name}: {found[0]}" + (f" and {len(found) - 1} more" if len(found) > 1 else "")
            for name, found in paths.items()
            if name != "copy"
        ]

    def fill(
        self, new: Decoder, start: Path, text: Callable[[], Iterable[Mapping[str, Tensor]]], seed: int
    ) -> tuple[Decoder, list[Operation]]:
        """Fill a decoder, initialised, in place.

        Args:
            new: the decoder, on the CPU
            start: a run's folder, a checkpoint or an imported folder
            text: gives batches of training text
            seed: of what operators draw

        Returns:
            the old decoder, and what was done

        Raises:
            ConfigError: as ``plan``; a size does not suit an operator; or it is not exact and has to be
        """
        from blocks.surgery import operate
        from interop.source import load

        old = load(start)
        steps = self.plan(old, new)
        done = operate(old, new, steps, self.growth, lambda: itertools.islice(text(), self.batches), seed)
        if self.exact:
            refuse_inexact(done)
        return old, done


def refuse_inexact(done: Sequence[Operation]) -> None:
    """Refuse operations that change what the model computes.

    Raises:
        ConfigError: at ``surgery.exact``
    """
    for operation in done:
        if not operation.exact:
            why = f" ({operation.note})" if operation.note else ""
            rule = f"{operation.name} changes what {operation.path} computes{why}"
            raise ConfigError(
                "surgery.exact", True, rule, "Write surgery.exact=false, or choose sizes that lose nothing"
            )
