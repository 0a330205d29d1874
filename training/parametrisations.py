"""The contract of ``parametrisation``: how initial values and rates of weights follow from the size of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.residual.base import Residual
from blockwright.blocks.scale import Scale, multiplier
from blockwright.blocks.widths import GROWS, NotScaledError, branches, grown, scales, unscaled_scores
from blockwright.registry import Composable, ConfigError, family, register
from blockwright.registry.layout import patched
from blockwright.training.optimizers.recipe import OptimizerRecipe


@family("parametrisation", root="", context=("model",))
class Parametrisation(Composable):
    """Factors on the initial scale, the learning rate, the decay and ε of every weight.

    Registered as ``@register("parametrisation", NAME)`` it is the option ``parametrisation=NAME`` at the root of a
    configuration; its constructor is its schema, as a block's is. It may also take ``model``, the complete composition
    of the run. The decoder and the optimizer of a run take its factors by the names of weights.
    """

    def __init__(self) -> None:
        """Nothing by default: a child declares its settings."""

    def scales(self, recipe: OptimizerRecipe) -> Mapping[str, Scale]:
        """Name of a weight → its factors; 1 for those that are not named.

        Args:
            recipe: of the run's optimizer, by whose steps rates are scaled

        Raises:
            ConfigError: at its setting
        """
        raise NotImplementedError

    def notes(self) -> list[str]:
        """Lines to print before the run, about what the rules do not cover."""
        return []


@register("parametrisation", "standard")
class Standard(Parametrisation):
    """One initial deviation and one rate for all weights, whatever their size: no factors."""

    def scales(self, recipe: OptimizerRecipe) -> Mapping[str, Scale]:
        return {}


EXAMPLE = "Write e.g. parametrisation.base={d_model: 64}"


@register("parametrisation", "width")
class Width(Parametrisation):
    """Rules of maximal update: a rate that is best at the base's width is nearly best at others.

    Yang et al. 2021 (μP), arXiv 2011.14522 and 2203.03466; the factors are in blocks/widths.py. At the base's own size
    all are 1, so the rate, ``model.init.std`` and λ are those of the base. They follow from shapes at two sizes, so
    that expert stacks, latents and blocks of plug-ins need no annotation; unlike the package ``mup``, no module is
    replaced, and a checkpoint stores plain weights.

    Args:
        base: what is smaller in the model that settings were tuned at, as overrides of the model: ``{d_model: 64}``,
            ``{d_model: 64, attention: {n_heads: 4}}``
    """

    def __init__(self, base: Mapping[str, Any], model: Mapping[str, Any] | None = None) -> None:
        self.base, self.model = dict(base), dict(model or {})
        if not self.base:
            raise ConfigError("parametrisation.base", self.base, "must name the smaller sizes", EXAMPLE)

    @property
    def narrower(self) -> Mapping[str, Any]:
        """The overrides that make the base of the same depth."""
        if self.base.get("n_layers", self.model["n_layers"]) != self.model["n_layers"]:
            rule = f"differs from the model's {self.model['n_layers']}, and these rules are for widths alone"
            remedy = "Leave it out, or write parametrisation=width_depth"
            raise ConfigError("parametrisation.base.n_layers", self.base["n_layers"], rule, remedy)
        return self.base

    @cached_property
    def decoders(self) -> tuple[Decoder, Decoder]:
        """The base and the model, of the same depth, on the meta device.

        Raises:
            ConfigError: the base cannot be composed, or has other weights
        """
        try:
            base = compose(patched(self.model, self.narrower), device="meta")
        except ConfigError as error:
            if error.path.startswith("parametrisation."):
                raise
            path = error.path.replace("model", "parametrisation.base", 1)
            raise ConfigError(path, error.value, error.rule, f"{error.remedy}, in parametrisation.base") from None
        decoder = compose(self.model, device="meta")
        try:
            grown(base, decoder)
        except ValueError as error:
            rule = f"makes a model with other weights ({error}): only sizes may differ"
            raise ConfigError("parametrisation.base", self.base, rule, EXAMPLE) from None
        return base, decoder

    def scales(self, recipe: OptimizerRecipe) -> Mapping[str, Scale]:
        try:
            return scales(*self.decoders, recipe.step_norm)
        except NotScaledError as error:
            raise ConfigError("parametrisation", type(self).__name__, str(error), error.remedy) from None

    def notes(self) -> list[str]:
        base, decoder = self.decoders
        kept = list(dict.fromkeys(_kept(base, decoder)))
        lines = [f"parametrisation: these sides do not grow from {self.base}: {', '.join(kept)}"] if kept else []
        if heads := dict.fromkeys(_anywhere(name) for name in unscaled_scores(base, decoder)):
            rule = "heads become wider, and no weight takes the factor on their scores"
            lines.append(f"parametrisation: {', '.join(heads)}: {rule}; give the base fewer heads of the same width")
        return lines


def _kept(base: Decoder, decoder: Decoder) -> Iterator[str]:
    """Sides of matrices that have the size of the base; the vocabulary's, of embedding and head, are left out."""
    for name, weight in grown(base, decoder).items():
        if weight.weight.kind == "matrix" and name.partition(".")[0] not in ("embedding", "head"):
            for side, growth in (("in", weight.inputs), ("out", weight.outputs)):
                if growth < GROWS:
                    yield f"{_anywhere(name)} {side}"


def _anywhere(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


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
