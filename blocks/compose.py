"""Read a model configuration by its schema, and build the decoder that it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import nn

from blockwright import registry
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import UNSCALED, initialise
from blockwright.blocks.input import Input, is_input
from blockwright.blocks.layer import LAYER_PARTS, MTP, OPTIONAL_PARTS, Layer
from blockwright.blocks.linear import Linear
from blockwright.blocks.loop import Loop
from blockwright.blocks.position.base import Position
from blockwright.blocks.precision import default_dtype
from blockwright.blocks.refusals import (
    MAX_DISTINCT,
    check_left,
    check_loop,
    check_room,
    check_together,
    refuse_beside_inputs,
    size,
    too_many_changes,
    written_at,
)
from blockwright.blocks.scale import Scale
from blockwright.registry import ConfigError, Node, Scope, did_you_mean, presets
from blockwright.registry.build import add_one
from blockwright.registry.layout import patched, plan
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


class Outline(NamedTuple):
    """A checked model of which each distinct layer is built once, on the meta device.

    config: complete
    frame: embedding, embedding position, final norm, head
    layers: index → the first of each distinct layer
    alike: the same index → those of the layers that have the same nodes
    nodes: the same index → kind → node
    depths: of multi-token prediction
    inputs: kind → input
    loop: visits layers again; None: each is visited once
    """

    config: dict[str, Any]
    frame: tuple[nn.Embedding, Position, Any, nn.Linear | None]
    layers: dict[int, Layer]
    alike: dict[int, list[int]]
    nodes: dict[int, dict[str, Any]]
    depths: list[MTP]
    inputs: dict[str, Input]
    loop: Loop | None


def check(config: Any) -> dict[str, Any]:
    """``read``, and build one of each distinct layer on the meta device: all checks of the blocks, without memory.

    Raises:
        ConfigError: a key, value, name or combination that no decoder can have
    """
    return outline(config).config


def outline(config: Any) -> Outline:
    """``check``, and what was built for it."""
    model = read(config)
    if len(model["overrides"] or []) > MAX_DISTINCT:
        raise too_many_changes()
    nodes, layers, alike = dict[int, dict[str, Any]](), dict[int, Layer](), dict[int, list[int]]()
    with torch.device("meta"):
        frame = _frame(model)
        for index, of_layer in enumerate(_plan(model)):
            if (first := next((i for i, known in nodes.items() if known == of_layer), None)) is not None:
                alike[first].append(index)
                continue
            if len(nodes) == MAX_DISTINCT:
                raise too_many_changes()
            layers[index] = _layer(model, of_layer, index)
            nodes[index], alike[index] = of_layer, [index]
        inputs = build_inputs(model)
        depths = _depths(model)
        loop = build_loop(model)
    refuse_beside_inputs(list(inputs), model, layers)
    of_layers = sum(size(layer) * len(alike[index]) for index, layer in layers.items())
    around = sum(size(part) for part in (*frame, *depths, *inputs.values(), loop) if part is not None)
    check_together(model, nodes, layers, around + of_layers)
    check_left(model, nodes, layers, alike, loop)
    check_loop(model, layers, loop)
    return Outline(model, frame, layers, alike, nodes, depths, inputs, loop)


def preset(name: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The composition of a published model, or of a preset of your own, in the form that ``compose`` takes.

    ``compose(preset("deepseek_v2_lite", {"n_layers": 4, "attention": "gqa"}))`` has the preset's other values.

    Args:
        name: a preset's name (registry/presets.py)
        changes: keys of a model; a block without a ``name`` changes values of the preset's block, one with replaces it

    Raises:
        ConfigError: there is no such preset, or its file cannot be read
    """
    return patched(presets.read(name), changes or {})


def compose(
    config: Any, *, device: torch.device | str = "cpu", seed: int = 0, scales: Mapping[str, Scale] = UNSCALED
) -> Decoder:
    """Build a decoder from a configuration.

    The configuration is checked before any memory is allocated, built on the meta device, then materialised and
    initialised.

    Args:
        config: YAML text, a mapping or an OmegaConf node; only registered names build anything
        device: where the weights go; ``meta`` leaves them unallocated
        seed: of the initial weights
        scales: name of a weight → factors of a parametrisation on its initial values

    Raises:
        ConfigError: with the configuration path, the value, the rule and the remedy
    """
    model = check(config)
    with torch.device("meta"):
        decoder = assemble(model)
    if torch.device(device).type == "meta":
        return decoder
    check_room(decoder, torch.device(device))
    decoder.to_empty(device=device)
    initialise(decoder, **model["init"], n_layers=model["n_layers"], seed=seed, scales=scales)
    return decoder


def assemble(model: Mapping[str, Any]) -> Decoder:
    """Build a checked configuration on the current default device, without the initialisation rule."""
    with default_dtype(torch.float32) as asked:  # what keeps its dtype must start in fp32; the rest is cast later
        embedding, position, norm, head = _frame(model)
        layers = [_layer(model, nodes, index) for index, nodes in enumerate(_plan(model))]
        around = _depths(model), build_inputs(model), build_loop(model)
        decoder = Decoder(model, embedding, position, layers, norm, head, *around)
    return decoder if asked == torch.float32 else decoder.to(asked)


def _plan(model: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    return plan(model, registry.layer_kinds(), registry.names)


def _context(model: Mapping[str, Any], layer_idx: int) -> dict[str, Any]:
    return {**{k: model[k] for k in ("vocab_size", "d_model", "n_layers", "max_positions")}, "layer_idx": layer_idx}


def _frame(model: Mapping[str, Any]) -> tuple[nn.Embedding, Position, Any, nn.Linear | None]:
    """The parts around the layers: embedding, embedding position, final norm, head."""
    V, D = model["vocab_size"], model["d_model"]
    context = {**_context(model, 0), "dim": D, "head_dim": D, "n_heads": 1}
    nodes = _nodes(model)
    position = nodes.get("position")
    placed = position if position and _place(position) == "embedding" else Node("none", "model.position")
    norm = _part("norm", nodes, context)
    try:
        # Passing a weight skips the random draw, for which torch on the meta device imports its compiler (one second).
        embedding = nn.Embedding.from_pretrained(torch.empty(V, D), freeze=False)
        head = None if model["tie_embeddings"] else Linear(D, V, bias=False)
    except (RuntimeError, TypeError):  # sizes beyond the address space
        rule = f"no tensor can hold vocab_size × d_model ({D}) numbers"
        raise ConfigError("model.vocab_size", V, rule, "Choose a smaller vocab_size or d_model") from None
    return embedding, registry.build("position", placed, Scope(nodes, context)), norm, head


def build_inputs(model: Mapping[str, Any]) -> dict[str, Input]:
    """Kind → the input of that kind, of a complete configuration, on the current default device.

    Raises:
        ConfigError: an error in one of them
    """
    scope = Scope(_nodes(model), _context(model, 0))
    return {kind: registry.build(kind, node, scope) for kind, node in scope.nodes.items() if is_input(kind)}


def build_loop(model: Mapping[str, Any]) -> Loop | None:
    """The loop of a complete configuration, on the current default device; None if it has none.

    Raises:
        ConfigError: an error in it
    """
    nodes = _nodes(model)
    return registry.build("loop", nodes["loop"], Scope(nodes, _context(model, 0))) if "loop" in nodes else None


def _nodes(model: Mapping[str, Any]) -> dict[str, Node]:
    """The nodes of a model outside its layers."""
    return {kind: Node(model[kind], f"model.{kind}") for kind in registry.kinds() if kind in model}


def _place(node: Node) -> str:
    entry, _ = registry.resolve("position", node)
    return entry.cls.place  # type: ignore[attr-defined]


def _layer(model: Mapping[str, Any], nodes: Mapping[str, dict[str, Any]], index: int) -> Layer:
    layer = Layer(**build_parts(model, nodes, index))
    for name, module in layer.named_modules():
        if isinstance(module, Position) and module.place == "embedding":
            kind, _, child = name.partition(".")
            path = written_at(model, kind, nodes[kind], index)
            rule = "works on the embeddings, below all layers, so a block inside a layer cannot have it"
            remedy = "Set it as model.position, for all layers"
            raise ConfigError(f"{path}.{child}", nodes[kind].get(child), rule, remedy)
    return layer


def build_parts(
    model: Mapping[str, Any], nodes: Mapping[str, dict[str, Any]], index: int, kinds: Sequence[str] = LAYER_PARTS
) -> dict[str, Any]:
    """Kind → that part of a layer, on the current default device; None for one that it is without.

    Args:
        model: complete
        nodes: of the layer, kind → node
        index: of the layer
        kinds: of the parts

    Raises:
        ConfigError: an error in one of them
    """
    placed = {kind: Node(node, written_at(model, kind, node, index)) for kind, node in nodes.items()}
    position = placed.get("position")
    if position and _place(position) == "embedding":
        if position.path != "model.position":
            rule = "works on the embeddings, below all layers, so it cannot be set for single layers"
            raise ConfigError(position.path, position.value["name"], rule, "Set it as model.position, for all layers")
        placed["position"] = Node("none", "model.position")
    context = _context(model, index)
    parts = {kind: _part(kind, placed, context) for kind in kinds if kind not in OPTIONAL_PARTS}
    for kind in (kind for kind in kinds if kind in OPTIONAL_PARTS):
        residual = parts.get("residual") or _part("residual", placed, context)
        parts[kind] = _optional(kind, placed, {**context, "n_streams": residual.streams}) if kind in placed else None
    return parts


def _optional(kind: str, nodes: Mapping[str, Node], context: Mapping[str, Any]) -> Any:
    """A part of a layer that reads and writes all of its residual streams."""
    if context["n_streams"] == 0:
        rule = "is added to all residual streams, and this model's residual block makes more of them in every layer"
        raise ConfigError(nodes[kind].path, nodes[kind].value, rule, "Choose another residual, e.g. prenorm or mhc")
    return _part(kind, nodes, {**context, "n_streams": context["n_streams"] or 1})


def _depths(model: Mapping[str, Any]) -> list[MTP]:
    """Multi-token prediction depths, each with a layer built like the last one."""
    nodes, D, depths = _plan(model)[-1], model["d_model"], []
    for k in range((model["mtp"] or {"depth": 0})["depth"]):
        layer = _layer(model, nodes, model["n_layers"] + k)
        if layer.attention.borrows() is not None:
            rule = "has layers like the last one, which borrows keys and values, and begins with none"
            raise ConfigError(
                "model.mtp.depth", model["mtp"]["depth"], rule, "Leave mtp out, or let the last layer lend"
            )
        context = {**_context(model, model["n_layers"] + k), "dim": D}
        norms = [
            _part("norm", {kind: Node(n, f"model.{kind}") for kind, n in nodes.items()}, context) for _ in range(3)
        ]
        depths.append(MTP(norms[0], norms[1], Linear(2 * D, D, bias=False), layer, norms[2]))
    return depths


def _part(kind: str, nodes: Mapping[str, Node], context: Mapping[str, Any]) -> Any:
    if kind not in nodes:
        rule = f"a decoder needs a block of kind {kind!r}, and layer {context['layer_idx']} has none"
        raise ConfigError(f"model.{kind}", None, rule, add_one(f"model/{kind}", kind))
    return registry.build(kind, nodes[kind], Scope(nodes, context))
