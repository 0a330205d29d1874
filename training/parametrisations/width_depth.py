from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.residual.base import Residual
from blockwright.blocks.scale import Scale, multiplier
from blockwright.blocks.widths import branches
from blockwright.registry import ConfigError, register
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parametrisations.width import Width


@register("parametrisation", "width_depth")
class WidthDepth(Width):
    """Rules of width, and each branch of the residual stream divided by the growth of the depth.

    CompleteP (Dey et al. 2025), arXiv 2505.01618, with α = 1: x ← x + f(x) / m_L, with m_L the layers for each layer of
    the base. The division is a factor 1/m_L on the values and steps of the weights that write into the stream, which
    for Adam and Muon is the same function at every step; inside a branch gradients fall as 1/m_L, and ε with them.

    Args:
        base: as of ``width``, and ``n_layers``: ``{d_model: 64, n_layers: 2}``
    """

    def __init__(self, base: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> None:
        super().__init__(base, model)

    @property
    def narrower(self) -> Mapping[str, Any]:
        return {key: value for key, value in self.base.items() if key != "n_layers"}

    def scales(self, recipe: OptimizerRecipe) -> Mapping[str, Scale]:
        factors, decoder = dict(super().scales(recipe)), self.decoders[1]
        depth = self.model["n_layers"] / self._layers()
        outputs = branches(decoder)
        _check(decoder, outputs)
        for name in factors:
            if name.startswith("layers."):
                inside = Scale(eps=1 / depth)  # of the gradient, which a branch's multiplier shrinks
                factors[name] = factors[name].times(inside)
                if name in outputs:
                    factors[name] = factors[name].times(multiplier(1 / depth))
        return factors

    def _layers(self) -> int:
        """Depth of the base."""
        layers = self.base.get("n_layers", self.model["n_layers"])
        if type(layers) is not int or layers < 1:
            rule = "is the number of layers of the base"
            raise ConfigError("parametrisation.base.n_layers", layers, rule, "Write e.g. n_layers: 2")
        return layers


def _check(decoder: Decoder, outputs: set[str]) -> None:
    """Refuse a layer with a branch that its output weights do not scale."""
    for index, layer in enumerate(decoder.layers):
        residual = layer.residual
        assert isinstance(residual, Residual)
        if not residual.adds_branches:
            rule = f"{type(residual).__name__} normalises or mixes what a branch adds, so no weight scales it"
            raise ConfigError("model.residual", type(residual).__name__, rule, "Write model/residual=prenorm")
        for part in ("attention", "ffn"):
            block = getattr(layer, part)
            inside = f"layers.{index}.{part}."
            if next(block.parameters(), None) is not None and not any(name.startswith(inside) for name in outputs):
                rule = f"{type(block).__name__} names no residual_outputs, the weights that write into the stream"
                raise ConfigError(f"model.{part}", type(block).__name__, rule, "Write parametrisation=width")
