"""Our own checkpoint format, for models no known family describes: the composition in config.json, our names.

transformers loads it after ``import blockwright.plugins.hub.transformers``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockwright.blocks.compose import check
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.names import Row

MODEL_TYPE = "blockwright"


@dataclass(frozen=True)
class Composition:
    """The whole composition under one key. As everywhere, only registered names build anything."""

    def read(self, config: Config, model: dict[str, Any]) -> None:
        given = config.take("composition", kind=dict)
        config.taken |= set(config.values)
        model.clear()
        model |= check(given)

    def write(self, decoder: Decoder, config: dict[str, Any]) -> None:
        config["composition"] = decoder.config
        config["vocab_size"], config["hidden_size"] = decoder.config["vocab_size"], decoder.config["d_model"]
        config["num_hidden_layers"] = decoder.config["n_layers"]


OWN = Family(
    model_type=MODEL_TYPE,
    architecture="BlockwrightForCausalLM",
    template={},
    settings=(Composition(),),
    names=(Row("{name}", "model.decoder.{name}"),),
    prefix="model.decoder.",
)
