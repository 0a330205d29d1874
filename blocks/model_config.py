"""The schema of a model configuration. Builds nothing; blocks/compose.py does."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from annotated_types import Ge, Le

from blockwright import registry
from blockwright.registry import ConfigError, Node, did_you_mean, presets
from blockwright.registry.ranges import Count, NonNegative, Positive
from blockwright.registry.reading import Remedy
from blockwright.registry.reading import read as read_settings


@dataclass(frozen=True)
class Init:
    """How weights are drawn (blocks/initialise.py)."""

    std: Annotated[NonNegative, Remedy("Use e.g. 0.006")] = 0.006
    depth_scaled: bool = False


@dataclass(frozen=True)
class Mtp:
    """Multi-token prediction (blocks/layer.py).

    Args:
        depth: further tokens to predict; 0 for none
        loss_weight: weight of their loss: 0.3 and later 0.1 in DeepSeek-V3
    """

    depth: Annotated[int, Ge(0), Le(64)] = 1
    loss_weight: NonNegative = 0.3


@dataclass(frozen=True)
class ModelConfig:
    """The keys of a model that are not blocks; all others are kinds (``attention``, ``ffn``, …).

    Args:
        vocab_size: V, at least the tokenizer's vocabulary
        d_model: D, width of the residual stream
        n_layers: depth
        max_positions: longest sequence in tokens; ``learned`` positions allocate it
        tie_embeddings: whether the output head is the embedding matrix
        scale_embeddings: whether embeddings are multiplied by √d_model, as in Gemma
        logit_softcap: bound of the output logits, by a tanh; 30 in Gemma-2
        mtp: multi-token prediction, if any
        init: how weights are drawn
        layout: slot → pattern over the depth (see registry/layout.py)
        variants: slot → name → alternative node, used by patterns and overrides
        overrides: list of {layers: selector, slot: node or patch; null for none}
        format: version of the saved composition
    """

    vocab_size: Count
    d_model: Count
    n_layers: Count
    max_positions: Count = 4096
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    logit_softcap: Annotated[Positive, Remedy("Use 30, or null for none")] | None = None
    mtp: Mtp | None = None
    init: Init = Init()
    layout: dict | None = None
    variants: dict | None = None
    overrides: list | None = None
    format: Count = presets.FORMAT


def read(config: Any) -> dict[str, Any]:
    """Validate a model configuration and convert it to complete plain data. Builds nothing.

    Args:
        config: YAML text, a mapping or an OmegaConf node

    Raises:
        ConfigError: unknown key, wrong type, missing value, a ``_target_``, an unknown block or block parameter
    """
    model = registry.to_plain(config)
    if isinstance(config, str) and isinstance(model, dict) and set(model) == {config}:  # a word, read as YAML
        remedy = "Write preset(NAME) for a preset, and the text of a file instead of its path"
        raise ConfigError("model", config, "must be a mapping or YAML text", remedy)
    if not isinstance(model, dict):
        raise ConfigError("model", model, "must be a mapping", "Write keys such as d_model and attention under model")
    registry.refuse_targets(model, "model")
    model = presets.inherited(model)
    presets.refuse_other_format(model)
    own, kinds = [each.name for each in fields(ModelConfig)], registry.kinds()
    for key, value in model.items():
        if key not in own and key not in kinds:
            known = did_you_mean(key, [*own, *kinds])
            raise ConfigError(f"model.{key}", value, "a model has no such key", known)
    given = {key: model[key] for key in own if key in model and model[key] != "???"}
    if given.get("mtp") == {}:
        given["mtp"] = None
    complete = asdict(read_settings(ModelConfig, given, "model"))
    if complete["mtp"] and not complete["mtp"]["depth"]:
        complete["mtp"] = None
    nodes = {kind: registry.as_written(kind, model[kind]) for kind in kinds if model.get(kind) is not None}
    for kind, node in nodes.items():
        registry.resolve(kind, Node(node, f"model.{kind}"))
    return {**complete, **nodes}


def reread(model: Any) -> Any:
    """A saved composition as this version would save it, for comparison; unchanged if this version cannot read it."""
    try:
        return read(model)
    except ConfigError:
        return model
