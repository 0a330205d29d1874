"""The schema of a model configuration. Builds nothing; blocks/compose.py does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, get_type_hints

from blockwright import registry
from blockwright.registry import ConfigError, Node, did_you_mean, presets
from blockwright.registry.format import FORMAT, current
from blockwright.registry.schema import conforms, in_words

MAX_MTP = 64


@dataclass
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
        mtp: ``depth`` of multi-token prediction and ``loss_weight``, its weight in the loss (see blocks/mtp.py)
        init: ``std`` of the weights, and ``depth_scaled`` (see blocks/initialise.py)
        layout: slot → pattern over the depth (see registry/layout.py)
        variants: slot → name → alternative node, used by patterns and overrides
        overrides: list of {layers: selector, slot: node or patch; null for none}
        format: version of the saved composition (see registry/format.py)
    """

    vocab_size: int
    d_model: int
    n_layers: int
    max_positions: int = 4096
    tie_embeddings: bool = False
    scale_embeddings: bool = False
    logit_softcap: float | None = None
    mtp: dict | None = None
    init: dict = field(default_factory=lambda: {"std": 0.006, "depth_scaled": False})
    layout: dict | None = None
    variants: dict | None = None
    overrides: list | None = None
    format: int = FORMAT


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
    model = current(presets.inherited(model))
    hints, kinds = get_type_hints(ModelConfig), registry.kinds()
    for key, value in model.items():
        if key not in hints and key not in kinds:
            known = did_you_mean(key, [*hints, *kinds])
            raise ConfigError(f"model.{key}", value, "a model has no such key", known)
    complete: dict[str, Any] = {}
    for f in fields(ModelConfig):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        value = model.get(f.name, default)
        if value is MISSING or value == "???":
            raise ConfigError(f"model.{f.name}", "???", "is required", f"Give a value: model.{f.name}=<int>")
        if not conforms(value, hints[f.name]):
            rule = f"must be {in_words(hints[f.name])}"
            raise ConfigError(f"model.{f.name}", value, rule, f"Write model.{f.name}=<value of that type>")
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise ConfigError(f"model.{f.name}", value, "must be at least 1", "Write a positive number")
        complete[f.name] = value
    complete["init"], complete["mtp"] = _init(complete["init"]), _mtp(complete["mtp"])
    cap = complete["logit_softcap"]
    if cap is not None and not 0 < cap < math.inf:
        raise ConfigError("model.logit_softcap", cap, "bounds the logits, so it is above 0", "Use 30, or null for none")
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


def _init(given: Mapping[str, Any]) -> dict[str, Any]:
    complete = {"std": 0.006, "depth_scaled": False}
    for key, value in given.items():
        if key not in complete:
            raise ConfigError(f"model.init.{key}", value, "init has no such key", did_you_mean(key, complete))
        if not conforms(value, float if key == "std" else bool):
            rule = "must be a number" if key == "std" else "must be true or false"
            raise ConfigError(f"model.init.{key}", value, rule, f"Write model.init.{key}={complete[key]}")
    complete |= given
    if not 0 <= complete["std"] < math.inf:
        rule = "a standard deviation is finite and not negative"
        raise ConfigError("model.init.std", complete["std"], rule, "Use e.g. 0.006")
    return complete


def _mtp(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not given:
        return None
    complete = {"depth": 1, "loss_weight": 0.3}
    for key, value in given.items():
        if key not in complete:
            raise ConfigError(f"model.mtp.{key}", value, "mtp has no such key", did_you_mean(key, complete))
    complete |= given
    depth, weight = complete["depth"], complete["loss_weight"]
    if not conforms(depth, int) or not 0 <= depth <= MAX_MTP:
        rule = f"counts further tokens to predict, at most {MAX_MTP}"
        raise ConfigError("model.mtp.depth", depth, rule, "Write 1, or 0 for none")
    if not conforms(weight, float) or not 0 <= weight < math.inf:
        rule = "weighs the loss, so it is a finite number and not negative"
        raise ConfigError("model.mtp.loss_weight", weight, rule, "Use 0.3, as DeepSeek-V3 at first, or 0.1")
    return complete if depth else None
