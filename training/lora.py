"""Low-rank adapters as configuration: ``adapter=lora adapter.targets=[attention] adapter.rank=8``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockwright.registry import ConfigError, plugins
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Count, Positive
from blockwright.training.patterns import matching

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blockwright.blocks.decoder import Decoder


@enforced("adapter")
class Lora:
    """Trains B A of W + alpha / rank · B A, and nothing else: Hu et al. 2021, arXiv 2106.09685 (blocks/lora.py).

    Every linear layer and stack of experts whose name matches is adapted; embeddings, norms and gates never are. Unlike
    PEFT, there is no dropout, and a name is a pattern of this project's parameter names.

    Args:
        targets: patterns of parameter names (training/patterns.py): ``attention``, ``experts``, ``layers.0.ffn``
        rank: r, width of A's output
        alpha: the update is scaled by alpha / rank
        start: folder of an adapter in PEFT's layout to start from; null for a new one
    """

    def __init__(
        self,
        targets: Sequence[str] = ("attention",),
        rank: Count = 8,
        alpha: Positive = 16.0,
        start: str | None = None,
    ) -> None:
        self.targets, self.rank, self.alpha, self.start = list(targets), rank, float(alpha), start

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank

    def record(self) -> dict[str, Any]:
        """What a checkpoint stores, from which its weights are merged."""
        return {"scale": self.scale, "rank": self.rank, "alpha": self.alpha, "targets": self.targets}

    def attach(self, decoder: Decoder) -> None:
        """Freeze a decoder and add adapters, without values.

        Raises:
            ConfigError: a target matches nothing that can have an adapter
        """
        from blockwright.blocks.lora import adaptable, attach

        names = matching(adaptable(decoder), self.targets, "adapter.targets", "linear layer or stack of experts")
        attach(decoder, names, self.rank, self.scale)

    def read(self, decoder: Decoder) -> Mapping[str, Tensor]:
        """The values to start from, by name; empty if new.

        Raises:
            ConfigError: the adapter at ``start`` is none, or another
        """
        if self.start is None:
            return {}
        from blockwright.blocks.lora import is_adapter

        theirs, scale = plugins.offered(plugins.WEIGHTS, "peft", "adapter.start")(Path(self.start), decoder)
        ours = {name: tuple(p.shape) for name, p in decoder.named_parameters() if is_adapter(name)}
        unlike = [
            name for name in {**ours, **theirs} if name not in theirs or ours.get(name) != tuple(theirs[name].shape)
        ]
        if unlike or abs(scale - self.scale) > 1e-6 * scale:
            rule = f"holds another adapter: {unlike[0] if unlike else f'its alpha / rank is {scale:g}'}"
            remedy = "Write its own targets, rank and alpha, from adapter_config.json"
            raise ConfigError("adapter.start", self.start, rule, remedy)
        return theirs


def fill(part: nn.Module, values: Mapping[str, Tensor], prefix: str = "") -> None:
    """Copy those of the values whose names begin with the prefix into a part of a decoder."""
    import torch

    own = part.state_dict()
    with torch.no_grad():
        for name, tensor in values.items():
            if name.startswith(prefix) and name.removeprefix(prefix) in own:
                own[name.removeprefix(prefix)].copy_(tensor)
