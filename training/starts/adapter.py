"""Low-rank adapters: ``adapter=lora adapter.targets=[attention] adapter.rank=8``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.linear import adaptable, attach, is_adapter
from blockwright.registry import ConfigError, plugins, register
from blockwright.registry.ranges import Count, Positive
from blockwright.registry.schema import Place
from blockwright.training.patterns import matching
from blockwright.training.starts.base import Start


@register("start", "adapter")
class Lora(Start):
    """Trains B A of W + alpha / rank · B A, and nothing else: Hu et al. 2021, arXiv 2106.09685 (blocks/linear.py).

    Every linear layer and stack of experts whose name matches is adapted; embeddings, norms and gates never are. Unlike
    PEFT, there is no dropout, and a name is a pattern of this project's parameter names.

    Args:
        targets: patterns of parameter names (training/patterns.py): ``attention``, ``experts``, ``layers.0.ffn``
        rank: r, width of A's output
        alpha: the update is scaled by alpha / rank
        start: folder of an adapter in PEFT's layout to start from; null for a new one
        model: composition of the run, with which that adapter is compared
        init_from: the trained model that is adapted
    """

    detachable = True

    def __init__(
        self,
        targets: Sequence[str] = ("attention",),
        rank: Count = 8,
        alpha: Positive = 16.0,
        start: Place | None = None,
        model: Mapping[str, Any] | None = None,
        init_from: str | None = None,
    ) -> None:
        self.targets, self.rank, self.alpha, self.start = list(targets), rank, float(alpha), start
        self.model, self.init_from = model, init_from

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank

    def check(self, model: Mapping[str, Any]) -> list[str]:
        if self.init_from is None:
            rule = "an adapter is trained on a model that stays as it is, and this one would be random"
            remedy = "Name its weights: init_from=RUN, or the OUT of blockwright import"
            raise ConfigError("init_from", None, rule, remedy)
        _ = self.values
        return []

    def attach(self, decoder: Decoder) -> None:
        names = matching(adaptable(decoder), self.targets, "adapter.targets", "linear layer or stack of experts")
        attach(decoder, names, self.rank, self.scale)

    def check_sharded(self, decoder: Decoder) -> None:
        if not any(p.requires_grad for p in decoder.layers.parameters()):
            rule = "adapts no layer, and sharded weights get gradients through layers only"
            raise ConfigError("adapter.targets", "head", rule, "Add a target in the layers, or write trainer=ddp")

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        own = part.state_dict()
        with torch.no_grad():
            for name, tensor in self.values.items():
                if name.startswith(prefix) and name.removeprefix(prefix) in own:
                    own[name.removeprefix(prefix)].copy_(tensor)

    def record(self) -> dict[str, Any]:
        settings = {"scale": self.scale, "rank": self.rank, "alpha": self.alpha, "targets": self.targets}
        return {"adapter": settings}

    @cached_property
    def values(self) -> Mapping[str, Tensor]:
        """The values to start from, by name; empty if new.

        Raises:
            ConfigError: the adapter at ``start`` is none, or another
        """
        if self.start is None:
            return {}
        decoder = compose(self.model, device="meta")
        self.attach(decoder)
        theirs, scale = plugins.offered(plugins.ADAPTERS, "peft", "adapter.start")(Path(self.start), decoder)
        ours = {name: tuple(p.shape) for name, p in decoder.named_parameters() if is_adapter(name)}
        unlike = [
            name for name in {**ours, **theirs} if name not in theirs or ours.get(name) != tuple(theirs[name].shape)
        ]
        if unlike or abs(scale - self.scale) > 1e-6 * scale:
            rule = f"holds another adapter: {unlike[0] if unlike else f'its alpha / rank is {scale:g}'}"
            remedy = "Write its own targets, rank and alpha, from adapter_config.json"
            raise ConfigError("adapter.start", self.start, rule, remedy)
        return theirs
