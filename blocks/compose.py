"""Build a decoder from a model configuration."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import registry
from blocks.decoder import Decoder, Layer
from blocks.gating.base import Gating
from blocks.images.base import Images
from blocks.initialise import initialise
from blocks.linear import Linear
from blocks.model_config import read
from blocks.mtp import MTP
from blocks.position.base import Position
from blocks.precision import built_in_full_precision
from blocks.selector.base import Selector
from registry import ConfigError, Node, Scope, presets
from registry.build import add_one
from registry.layout import patched, plan

LAYER_PARTS = ("attention", "ffn", "residual")  # the parts of a layer; every other kind is a child
MAX_PARAMETERS = 10**14  # a hundred times the largest known model
MAX_DISTINCT = 256  # distinct layers of one model


def check(config: Any) -> dict[str, Any]:
    """``read``, and build one of each distinct layer on the meta device: all checks of the blocks, without memory.

    Raises:
        ConfigError
    """
    model = read(config)
    if len(model["overrides"] or []) > MAX_DISTINCT:
        raise _too_many_changes()
    distinct: list[dict[str, Any]] = []
    layers: dict[int, Layer] = {}
    alike: list[int] = []  # how many layers equal each distinct one
    with torch.device("meta"):
        around = [part for part in _frame(model) if part is not None]
        for index, nodes in enumerate(_plan(model)):
            if nodes in distinct:
                alike[distinct.index(nodes)] += 1
                continue
            if len(distinct) == MAX_DISTINCT:
                raise _too_many_changes()
            distinct.append(nodes)
            layers[index] = _layer(model, nodes, index)
            alike.append(1)
        around += [*_depths(model), images] if (images := _images(model)) else _depths(model)
        if images is not None:
            _refuse_beside_images(model, layers)
    of_layers = sum(_size(layer) * times for layer, times in zip(layers.values(), alike, strict=True))
    _check_size(sum(map(_size, around)) + of_layers)
    _refuse_other_streams(model, dict(zip(layers, distinct, strict=True)), layers)
    _refuse_nothing_to_share(model, dict(zip(layers, distinct, strict=True)), layers)
    _refuse_untaken(model, dict(zip(layers, distinct, strict=True)), layers)
    _check_variants(model)
    return model


def _too_many_changes() -> ConfigError:
    rule = f"makes more than {MAX_DISTINCT} layers that are all different"
    return ConfigError("model.overrides", "…", rule, "Name variants in a layout pattern, which repeats")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _check_size(parameters: int) -> None:
    if parameters > MAX_PARAMETERS:
        rule = f"has {parameters:.3g} parameters, and no machine holds more than {MAX_PARAMETERS:.0e}"
        raise ConfigError("model", f"{parameters:.3g}", rule, "Lower its widths, depth or experts")


def _check_room(decoder: Decoder, device: torch.device) -> None:
    """Refuse, before anything is allocated, weights that this machine cannot hold."""
    needed, room = sum(t.nbytes for t in decoder.state_dict().values()), _room(device)
    if needed > room:
        rule = f"needs {needed / 1e9:.3g} GB for its weights alone, and {device.type} here has {room / 1e9:.3g} GB"
        remedy = "Choose a smaller model, or device='meta' to look at it without its weights"
        raise ConfigError("model", f"{_size(decoder):.3g} parameters", rule, remedy)


def _room(device: torch.device) -> float:
    """Total memory of a device in bytes; inf if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return math.inf
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit, if lower
    text = limit.read_text().strip() if limit.is_file() else ""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, int(text)) if text.isdigit() else whole


def _refuse_other_streams(
    model: Mapping[str, Any], nodes: Mapping[int, dict[str, Any]], layers: Mapping[int, Layer]
) -> None:
    """Refuse layers that cannot read what the layers below them give."""
    own = {index: layer.residual.streams for index, layer in layers.items()}
    first = own.get(0)
    for index, streams in own.items():
        if streams != first:
            node = nodes[index]["residual"]
            rule = f"passes on {_streams(streams)}, and the first layer {_streams(first)}"
            remedy = "Give all layers the same number of streams"
            raise ConfigError(_written_at(model, "residual", node, index), node["name"], rule, remedy)


def _refuse_nothing_to_share(
    model: Mapping[str, Any], nodes: Mapping[int, dict[str, Any]], layers: Mapping[int, Layer]
) -> None:
    """Refuse a layer that reuses the choice of keys of one below, where none below makes one."""
    chosen = False
    for index in sorted(layers):
        selectors = [m for m in layers[index].attention.modules() if isinstance(m, Selector)]
        if not chosen and selectors and all(selector.reuses for selector in selectors):
            kind = "selector" if "selector" in nodes[index] else "attention"
            node = nodes[index][kind]
            rule = f"reuses which keys a layer below it chose, and none below layer {index} chooses"
            remedy = "Give that layer a selector of its own: by every: 1, or by a variant of selector in the layout"
            raise ConfigError(_written_at(model, kind, node, index), node["name"], rule, remedy)
        chosen = chosen or bool(selectors)


def _streams(count: Any) -> str:
    return "one stream" if count is None else f"{count} streams" if count else "one stream for each source"


def _refuse_untaken(model: Mapping[str, Any], nodes: Mapping[int, dict[str, Any]], layers: Mapping[int, Layer]) -> None:
    """Refuse an optional child (e.g. ``qk_norm``) that no block uses: an ablation of it would change nothing.

    A child that some block requires (``gating`` in ``moe``) may stay unused: a dense ffn may be swapped in. So may one
    that every block which could take it sets to null.
    """
    for kind, hosts in _optional_children().items():
        for index, node in ((i, of_layer[kind]) for i, of_layer in nodes.items() if kind in of_layer):
            block = registry.lookup(kind, node["name"]).cls
            alike = [i for i, of_layer in nodes.items() if of_layer.get(kind) == node]
            taken = any(isinstance(module, block) for i in alike for module in layers[i].modules())
            if not taken and not any(_declines(kind, nodes[i]) for i in alike):
                rule = f"no block of this model takes this {kind}, so it would change nothing"
                remedy = f"Remove it (model.{kind}=null), or choose a block that takes one: {hosts or 'none'}"
                raise ConfigError(_written_at(model, kind, node, index), node["name"], rule, remedy)


def _declines(kind: str, nodes: Mapping[str, dict[str, Any]]) -> bool:
    """Whether some block of a layer sets a child of this kind to null."""
    scope = {k: Node(node, f"model.{k}") for k, node in nodes.items()}
    return any(
        p.child == kind and given[p.name] is None
        for part in LAYER_PARTS
        if part in scope
        for _, entry, given in registry.walk(part, scope[part], scope)
        for p in entry.schema.children.values()
    )


def _optional_children() -> dict[str, str]:
    """Kinds that are optional for every block that takes one → these blocks, as text."""
    taken: dict[str, list[tuple[str, str, bool]]] = {k: [] for k in registry.layer_kinds() if k not in LAYER_PARTS}
    for host in registry.kinds():
        for name in registry.names(host):
            for p in registry.lookup(host, name).schema.children.values():
                if p.child in taken:
                    taken[p.child].append((host, name, p.optional))
    return {
        kind: ", ".join(
            f"{k} {'|'.join(n for h, n, _ in hosts if h == k)}" for k in dict.fromkeys(h for h, *_ in hosts)
        )
        for kind, hosts in taken.items()
        if all(optional for *_, optional in hosts)
    }


def _check_variants(model: Mapping[str, Any]) -> None:
    """Check variants that no layer uses too, so that a typo in them is found now."""
    for kind, variants in (model["variants"] or {}).items():
        for name, node in (variants or {}).items():
            own = model.get(kind) or {}
            patches = isinstance(node, Mapping) and "name" not in node
            node = patched({"name": own} if isinstance(own, str) else own, node) if patches else node
            if node is None:
                continue
            registry.resolve(kind, Node(node, f"model.variants.{kind}.{name}"))


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


def compose(config: Any, *, device: torch.device | str = "cpu", seed: int = 0) -> Decoder:
    """Build a decoder from a configuration.

    The configuration is checked before any memory is allocated, built on the meta device, then materialised and
    initialised.

    Args:
        config: YAML text, a mapping or an OmegaConf node; only registered names build anything
        device: where the weights go; ``meta`` leaves them unallocated
        seed: of the initial weights

    Raises:
        ConfigError: with the configuration path, the value, the rule and the remedy
    """
    model = check(config)
    with torch.device("meta"):
        decoder = assemble(model)
    if torch.device(device).type == "meta":
        return decoder
    _check_room(decoder, torch.device(device))
    decoder.to_empty(device=device)
    initialise(decoder, **model["init"], n_layers=model["n_layers"], seed=seed)
    return decoder


def assemble(model: Mapping[str, Any]) -> Decoder:
    """Build a checked configuration on the current default device, without the initialisation rule."""
    dtype = torch.get_default_dtype()
    with built_in_full_precision():  # what keeps its dtype must start in fp32; the rest is cast later
        embedding, position, norm, head = _frame(model)
        layers = [_layer(model, nodes, index) for index, nodes in enumerate(_plan(model))]
        decoder = Decoder(model, embedding, position, layers, norm, head, _depths(model), _images(model))
    return decoder if dtype == torch.float32 else decoder.to(dtype)


def _plan(model: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
    return plan(model, registry.layer_kinds(), registry.names)


def _context(model: Mapping[str, Any], layer_idx: int) -> dict[str, Any]:
    return {**{k: model[k] for k in ("vocab_size", "d_model", "n_layers", "max_positions")}, "layer_idx": layer_idx}


def _frame(model: Mapping[str, Any]) -> tuple[nn.Embedding, Position, Any, nn.Linear | None]:
    """The parts around the layers: embedding, embedding position, final norm, head."""
    V, D = model["vocab_size"], model["d_model"]
    context = {**_context(model, 0), "dim": D, "head_dim": D, "n_heads": 1}
    nodes = {kind: Node(model[kind], f"model.{kind}") for kind in registry.kinds() if kind in model}
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


def images_of(config: Any) -> Images:
    """The image side of a model, on the meta device: what its tiling counts, without building the rest.

    Raises:
        ConfigError: an error in it, or there is none
    """
    model = read(config)
    with torch.device("meta"):
        if (images := _images(model)) is None:
            remedy = add_one("model/images", "images")
            raise ConfigError("model.images", None, "this model reads text alone", remedy)
        return images


def _images(model: Mapping[str, Any]) -> Images | None:
    if model.get("images") is None:
        return None
    nodes = {kind: Node(model[kind], f"model.{kind}") for kind in registry.kinds() if kind in model}
    return registry.build("images", nodes["images"], Scope(nodes, _context(model, 0)))


def _refuse_beside_images(model: Mapping[str, Any], layers: Mapping[int, Layer]) -> None:
    """Refuse what reads the ids of tokens: all places of all images have one."""
    remedy = "Leave it out, or the images (model.images=null)"
    if model["mtp"]:
        raise ConfigError("model.mtp", model["mtp"], "embeds token ids, and the places of images share one", remedy)
    for gate in (m for layer in layers.values() for m in layer.modules() if isinstance(m, Gating)):
        if gate.by_id:
            rule = "routes by token id, and the places of images share one"
            raise ConfigError("model.gating", type(gate).__name__, rule, remedy)


def _place(node: Node) -> str:
    entry, _ = registry.resolve("position", node)
    return entry.cls.place  # type: ignore[attr-defined]


def _layer(model: Mapping[str, Any], nodes: Mapping[str, dict[str, Any]], index: int) -> Layer:
    context = _context(model, index)
    placed = {kind: Node(node, _written_at(model, kind, node, index)) for kind, node in nodes.items()}
    position = placed.get("position")
    if position and _place(position) == "embedding":
        if position.path != "model.position":
            rule = "works on the embeddings, below all layers, so it cannot be set for single layers"
            raise ConfigError(position.path, position.value["name"], rule, "Set it as model.position, for all layers")
        placed["position"] = Node("none", "model.position")
    layer = Layer(**{kind: _part(kind, placed, context) for kind in LAYER_PARTS})
    for name, module in layer.named_modules():
        if isinstance(module, Position) and module.place == "embedding":
            kind, _, child = name.partition(".")
            rule = "works on the embeddings, below all layers, so a block inside a layer cannot have it"
            remedy = "Set it as model.position, for all layers"
            raise ConfigError(f"{placed[kind].path}.{child}", placed[kind].value.get(child), rule, remedy)
    return layer


def _depths(model: Mapping[str, Any]) -> list[MTP]:
    """Multi-token prediction depths, each with a layer built like the last one."""
    nodes, D, depths = _plan(model)[-1], model["d_model"], []
    for k in range((model["mtp"] or {"depth": 0})["depth"]):
        layer = _layer(model, nodes, model["n_layers"] + k)
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


def _written_at(model: Mapping[str, Any], kind: str, node: Mapping[str, Any], index: int) -> str:
    """Configuration path of a layer's node, for error messages."""
    own = model.get(kind)
    if node == own or node == {"name": own}:
        return f"model.{kind}"
    for name, variant in ((model.get("variants") or {}).get(kind) or {}).items():
        if node == variant:
            return f"model.variants.{kind}.{name}"
    return f"model.{kind} (layer {index})"
