"""What a model is refused for that no block of it can see alone: its size, its layers together, parts without use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from blockwright import registry
from blockwright.blocks.convolution import Convolution
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.ffn import FFN
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.kernels.machine import device_memory
from blockwright.blocks.layer import LAYER_PARTS, Layer
from blockwright.blocks.loop import Loop
from blockwright.blocks.position.base import Position
from blockwright.blocks.position.rotary import OF_MODULES
from blockwright.blocks.selector.base import Selector
from blockwright.registry import ConfigError, Node
from blockwright.registry.catalogue import find_family
from blockwright.registry.layout import patched
from blockwright.registry.schema import INHERIT, Parameter

MAX_PARAMETERS = 10**14  # a hundred times the largest known model
MAX_DISTINCT = 256  # distinct layers of one model

Nodes = Mapping[int, dict[str, Any]]  # index of a layer → kind → node; of the first of each distinct layer
Layers = Mapping[int, Layer]


def check_together(model: Mapping[str, Any], nodes: Nodes, layers: Layers, parameters: int) -> None:
    """Check what only the whole model shows.

    Args:
        model: complete
        nodes: of the first of each distinct layer
        layers: the same, built
        parameters: of the whole model

    Raises:
        ConfigError
    """
    if parameters > MAX_PARAMETERS:
        rule = f"has {parameters:.3g} parameters, and no machine holds more than {MAX_PARAMETERS:.0e}"
        raise ConfigError("model", f"{parameters:.3g}", rule, "Lower its widths, depth or experts")
    _refuse_other_streams(model, nodes, layers)
    _refuse_nothing_to_share(model, nodes, layers)
    _refuse_unlent(model, nodes, layers)
    _refuse_selected(model, nodes, layers)
    _refuse_untaken(model, nodes, layers)
    _check_variants(model)


def refuse_beside_inputs(inputs: Sequence[str], model: Mapping[str, Any], layers: Layers) -> None:
    """Refuse, beside inputs of these kinds, what reads the ids of tokens: all places of an input have one.

    Raises:
        ConfigError
    """
    if not inputs:
        return
    kinds = " and ".join(inputs)
    remedy = f"Leave it out, or the {kinds} ({' '.join(f'model.{kind}=null' for kind in inputs)})"
    if model["mtp"]:
        raise ConfigError("model.mtp", model["mtp"], f"embeds token ids, and the places of {kinds} share one", remedy)
    for gate in (m for layer in layers.values() for m in layer.modules() if isinstance(m, Gating)):
        if gate.by_id:
            rule = f"routes by token id, and the places of {kinds} share one"
            raise ConfigError("model.gating", type(gate).__name__, rule, remedy)


LOOPED = ("entry", "exit", "visit_draw")  # the kinds of a loop's children


def check_loop(model: Mapping[str, Any], layers: Layers, loop: Loop | None) -> None:
    """Check that a loop suits the layers, and that nothing of one is written without it.

    Raises:
        ConfigError
    """
    written = model.get("loop")
    own = written if isinstance(written, Mapping) else {}
    for kind in LOOPED:
        taken = loop is not None and any(isinstance(m, find_family(kind).contract) for m in loop.children())
        declined = own.get(kind, INHERIT) is None
        if model.get(kind) is not None and not taken and not declined:
            rule = f"no block of this model takes this {kind}, so it would change nothing"
            raise ConfigError(f"model.{kind}", model[kind], rule, f"Write model.loop.{kind}, or leave it out")
    if loop is not None and loop.entry.one_stream and (streams := layers[0].residual.streams) is not None:
        rule = f"reads one residual stream, and the layers of this model have {_streams(streams)}"
        raise ConfigError("model.loop.entry", type(loop.entry).__name__, rule, "Write model.loop.entry=plain")


def too_many_changes() -> ConfigError:
    rule = f"makes more than {MAX_DISTINCT} layers that are all different"
    return ConfigError("model.overrides", "…", rule, "Name variants in a layout pattern, which repeats")


def size(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def check_room(decoder: Decoder, device: torch.device) -> None:
    """Refuse, before anything is allocated, weights that this machine cannot hold."""
    needed, there = sum(t.nbytes for t in decoder.state_dict().values()), device_memory(device)
    if needed > there:
        rule = f"needs {needed / 1e9:.3g} GB for its weights alone, and {device.type} here has {there / 1e9:.3g} GB"
        remedy = "Choose a smaller model, or device='meta' to look at it without its weights"
        raise ConfigError("model", f"{size(decoder):.3g} parameters", rule, remedy)


def _refuse_other_streams(model: Mapping[str, Any], nodes: Nodes, layers: Layers) -> None:
    """Refuse layers that cannot read what the layers below them give."""
    own = {index: layer.residual.streams for index, layer in layers.items()}
    first = own.get(0)
    for index, streams in own.items():
        if streams != first:
            node = nodes[index]["residual"]
            rule = f"passes on {_streams(streams)}, and the first layer {_streams(first)}"
            remedy = "Give all layers the same number of streams"
            raise ConfigError(written_at(model, "residual", node, index), node["name"], rule, remedy)


def _refuse_nothing_to_share(model: Mapping[str, Any], nodes: Nodes, layers: Layers) -> None:
    """Refuse a layer that reuses the choice of keys of one below, where none below makes one."""
    chosen = False
    for index in sorted(layers):
        selectors = [m for m in layers[index].attention.modules() if isinstance(m, Selector)]
        if not chosen and selectors and all(selector.reuses for selector in selectors):
            kind = "selector" if "selector" in nodes[index] else "attention"
            node = nodes[index][kind]
            rule = f"reuses which keys a layer below it chose, and none below layer {index} chooses"
            remedy = "Give that layer a selector of its own: by every: 1, or by a variant of selector in the layout"
            raise ConfigError(written_at(model, kind, node, index), node["name"], rule, remedy)
        chosen = chosen or bool(selectors)


def _refuse_unlent(model: Mapping[str, Any], nodes: Nodes, layers: Layers) -> None:
    """Refuse a layer that borrows keys and values where none below lends such, or rotates queries otherwise."""
    lent: dict[str, Any] = {}
    for index in sorted(layers):
        attention: Any = layers[index].attention
        if (borrowed := attention.borrows()) is not None:
            kind = "kv_source" if "kv_source" in nodes[index] else "attention"
            node = nodes[index][kind]
            where = written_at(model, kind, node, index), node["name"]
            if borrowed not in lent:
                rule = f"borrows keys and values ({borrowed}), and no layer below layer {index} lends such"
                rule += f": those below lend {' | '.join(lent)}" if lent else ""
                remedy = "Give a layer below, with this window and these heads, kv_source: lent"
                remedy = remedy if kind == "kv_source" else "Give a layer below such keys of its own"
                raise ConfigError(*where, rule, remedy)
            if lent[borrowed] != _turning(attention.position):
                rule = f"turns the queries of layer {index} by other angles than the lender's keys"
                raise ConfigError(*where, rule, "Give both layers one position")
        if (name := attention.lends()) is not None:
            lent[name] = _turning(attention.position)


def _turning(position: Position) -> Any:
    """Equal for positions that turn keys alike: those with equal settings, and so have the blocks in them."""
    settings = [(type(m), {k: v for k, v in vars(m).items() if k not in OF_MODULES}) for m in position.modules()]
    return position.alike() or repr(settings)


def _refuse_selected(model: Mapping[str, Any], nodes: Nodes, layers: Layers) -> None:
    """Refuse a feed-forward block that needs all tokens, under a residual block that gives it some of them."""
    for index, layer in layers.items():
        blocks = layer.ffn.modules() if layer.residual.selects else ()
        for block in blocks:
            if isinstance(block, Convolution) or (isinstance(block, FFN) and block.adds_left):
                node = nodes[index]["ffn"]
                rule = f"needs all tokens ({type(block).__name__}), and this layer's residual block gives it some"
                remedy = "Choose another residual, e.g. prenorm, or another ffn"
                raise ConfigError(written_at(model, "ffn", node, index), node["name"], rule, remedy)


def check_left(
    model: Mapping[str, Any], nodes: Nodes, layers: Layers, alike: Mapping[int, Sequence[int]], loop: Loop | None
) -> None:
    """Refuse a layer that leaves something for the next one, whose feed-forward block does not add it.

    Args:
        alike: the index of each of ``layers`` → those of the layers that are equal to it
        loop: after its last layer comes its first one

    Raises:
        ConfigError
    """
    first = {index: one for one, group in alike.items() for index in group}
    order = range(len(first)) if loop is None else loop.order(max(2, loop.visits))  # another number may be asked for
    for index, after in pairwise(order):
        below, above = (_ffns(layers[first[i]]) for i in (index, after))
        keeps = index == len(first) - 1  # which adds what it would leave
        if any(block.leaves for block in below) and not keeps and not any(block.adds_left for block in above):
            node = nodes[first[after]]["ffn"]
            rule = f"would drop what the feed-forward block of layer {index} leaves for that of layer {after}"
            remedy = f"Give layer {after} a block of the same name as layer {index}"
            raise ConfigError(written_at(model, "ffn", node, first[after]), node["name"], rule, remedy)


def _ffns(layer: Layer) -> list[FFN]:
    return [block for block in layer.ffn.modules() if isinstance(block, FFN)]


def _streams(count: Any) -> str:
    return "one stream" if count is None else f"{count} streams" if count else "one stream for each source"


def _refuse_untaken(model: Mapping[str, Any], nodes: Nodes, layers: Layers) -> None:
    """Refuse an optional child (e.g. ``qk_norm``) that no block uses: an ablation of it would change nothing.

    A child that some block requires (``gating`` in ``moe``) may stay unused: a dense ffn may be swapped in. So may one
    that every block which could take it sets to null.
    """
    chosen = {kind for of_layer in nodes.values() for kind in of_layer} - set(LAYER_PARTS)
    for kind in sorted(chosen):
        places = [i for i, of_layer in nodes.items() if kind in of_layer]
        while places:
            index, node = places[0], nodes[places[0]][kind]
            block = registry.lookup(kind, node["name"]).cls
            alike = [i for i in places if nodes[i][kind] == node]
            places = [i for i in places if i not in alike]
            taken = any(isinstance(module, block) for i in alike for module in layers[i].modules())
            reached = taken and any(_reaches(kind, nodes[i]) for i in alike)
            if reached or any(_declines(kind, nodes[i]) for i in alike):
                continue
            hosts = _hosts(kind)
            if all(p.optional for *_, p in hosts):
                rule = f"no block of this model takes this {kind}, so it would change nothing"
                remedy = f"Remove it (model.{kind}=null), or choose a block that takes one: {_listed(hosts)}"
                raise ConfigError(written_at(model, kind, node, index), node["name"], rule, remedy)


def _declines(kind: str, nodes: Mapping[str, dict[str, Any]]) -> bool:
    """Whether some block of a layer sets a child of this kind to null."""
    return any(given is None for _, given in _places(kind, nodes))


def _reaches(kind: str, nodes: Mapping[str, dict[str, Any]]) -> bool:
    """Whether the model's own block of a kind is some block's child: one that is optional has the name of the kind."""
    return any(p.name == kind or not p.optional for p, _ in _places(kind, nodes))


def _places(kind: str, nodes: Mapping[str, dict[str, Any]]) -> Iterator[tuple[Parameter, Any]]:
    """The parameters of a layer's blocks that take a child of this kind, with what is written for them."""
    scope = {k: Node(node, f"model.{k}") for k, node in nodes.items()}
    for part in LAYER_PARTS:
        for _, entry, given in registry.walk(part, scope[part], scope) if part in scope else ():
            yield from ((p, given[p.name]) for p in entry.schema.children.values() if p.child == kind)


def _hosts(kind: str) -> list[tuple[str, str, Parameter]]:
    """Kind and name of every block that takes a child of this kind, and the parameter that takes it.

    A block that wraps another of its own kind is no host: it is a choice itself. This imports the whole catalogue.
    """
    return [
        (host, name, p)
        for host in registry.kinds()
        for name in registry.names(host)
        for p in registry.lookup(host, name).schema.children.values()
        if p.child == kind and kind != host
    ]


def _listed(hosts: list[tuple[str, str, Parameter]]) -> str:
    """``attention gqa|mha``; where parameters have names of their own, ``attention.key_conv gqa|mha``."""
    names = dict[str, dict[str, None]]()
    for kind, name, p in hosts:
        names.setdefault(kind if p.name == p.child else f"{kind}.{p.name}", {})[name] = None
    return ", ".join(f"{place} {'|'.join(of)}" for place, of in names.items()) or "none"


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


def written_at(model: Mapping[str, Any], kind: str, node: Mapping[str, Any], index: int) -> str:
    """Configuration path of a layer's node, for error messages."""
    own: Any = model.get(kind)
    if node == own or node == {"name": own}:
        return f"model.{kind}"
    for name, variant in ((model.get("variants") or {}).get(kind) or {}).items():
        patches = isinstance(variant, Mapping) and "name" not in variant and own
        if node == (patched({"name": own} if isinstance(own, str) else own, variant) if patches else variant):
            return f"model.variants.{kind}.{name}"
    return f"model.{kind} (layer {index})"
