from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.scale import Scale
from blockwright.blocks.widths import GROWS, NotScaledError, grown, scales, unscaled_scores
from blockwright.registry import ConfigError, register
from blockwright.registry.layout import patched
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parametrisations.base import Parametrisation

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
