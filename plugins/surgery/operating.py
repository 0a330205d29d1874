"""Surgery: the weights of a new composition from those of a trained one, block by block.

Both decoders are walked in parallel. A block that computes the same is copied; where a registered transplant serves,
it makes the new weights; otherwise what has the same name and shape is copied, and the rest stays drawn. Every
operation is recorded: which operator, what it claims, and how many numbers were copied, derived and drawn. Then old and
new read the same random tokens, and every claim is checked against their logits (plugins/surgery/ledger.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.layer import LAYER_PARTS, OPTIONAL_PARTS
from blockwright.blocks.loop import Loop
from blockwright.plugins.surgery.growth import Growth
from blockwright.plugins.surgery.ledger import DEPTH, Ledger, Operation, measured
from blockwright.plugins.surgery.probing import FRAME, LOOP, grown, silence
from blockwright.plugins.surgery.transplant.base import (
    Setting,
    Transplant,
    Transplanted,
    differences,
    left_drawn,
    shapes,
    shown,
    unhandled,
)
from blockwright.registry import BlockError, ConfigError, Node, Scope

SEEN = 64  # tokens by which a layer shows that it has no effect
Named = tuple[str, Transplant]  # an operator and its name
Batches = Iterable[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Step:
    """One block of the new decoder, and what makes its weights.

    Args:
        path: of the block in the new decoder: ``layers.3.attention``
        source: of the block that it comes from in the old one; None if there is none
        name: of the operator
        operator: what makes the weights; None leaves them as drawn
    """

    path: str
    source: str | None
    name: str
    operator: Transplant | None


class _Copy(Transplant):
    """A block that computes the same."""

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        return shapes(old) == shapes(new) and not differences(old, new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        return Transplanted(old.state_dict(), frozenset(old.state_dict()), exact=True)


class _Untie(_Copy):
    """The matrix of the embedding becomes that of an output head."""

    handles = ("name", "max_norm", "norm_type", "padding_idx", "scale_grad_by_freq", "sparse")


class _Fit(Transplant):
    """Another block, or other settings: copies what has the same name and shape, and claims nothing."""

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        return True

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        there, here = old.state_dict(), shapes(new)
        same = {name: t for name, t in there.items() if here.get(name) == tuple(t.shape)}
        note = "" if len(same) == len(here) == len(there) else "what has the same name and shape"
        return Transplanted(same, frozenset(same), exact=False, note=note)


COPY, FIT = ("copy", _Copy()), ("fit", _Fit())


def automatic() -> list[Named]:
    """The registered transplants that are taken without being named."""
    found = [(name, build(name, "surgery.transplant")) for name in registry.names("transplant")]
    return [(name, operator) for name, operator in found if operator.automatic]


def build(node: Any, path: str) -> Transplant:
    """The transplant of a node."""
    return registry.build("transplant", Node(node, path), Scope({}, {}))


# --- planning ---------------------------------------------------------------------------------------------------------


def plan(old: Decoder, new: Decoder, named: Sequence[Named], growth: Growth) -> list[Step]:
    """Choose an operator for every block. Both decoders may be on the meta device.

    Args:
        old, new: the trained decoder, and the one to fill
        named: operators that are preferred where they serve, in this order
        growth: where the layers come from, if their numbers differ

    Raises:
        ConfigError: several operators serve one block, a named one serves none, or the vocabulary is another
    """
    _refuse_another_vocabulary(old, new)
    _refuse_a_head_of_another_width(old, new)
    _refuse_a_loop_at_another_depth(old, new)
    others = automatic()
    pairs = _pairs(old, new, growth)
    steps = [_step(path, source, old, new, named, others) for path, source in pairs]
    for name, _ in named:
        if name not in {step.name for step in steps}:
            rule = "serves no block that changes here"
            raise ConfigError("surgery.transplant", name, rule, "Leave it out, or change a block that it can make")
    return steps


def _refuse_another_vocabulary(old: Decoder, new: Decoder) -> None:
    there, here = old.config["vocab_size"], new.config["vocab_size"]
    if there != here:
        rule = f"is {there} in the trained model, and no operator makes weights for other tokens"
        raise ConfigError("model.vocab_size", here, rule, f"Write model.vocab_size={there}")


def _refuse_a_head_of_another_width(old: Decoder, new: Decoder) -> None:
    widths = old.config["d_model"], new.config["d_model"]
    if old.head is None and new.head is not None and widths[0] != widths[1]:
        rule = f"has a head of width {widths[1]} made from the trained embedding, which is of width {widths[0]}"
        raise ConfigError("model.tie_embeddings", False, rule, "Write model.tie_embeddings=true, or keep d_model")


def _refuse_a_loop_at_another_depth(old: Decoder, new: Decoder) -> None:
    if old.loop is not None and len(old.layers) != len(new.layers):
        rule = f"is {len(old.layers)} in the trained model, which visits layers again"
        raise ConfigError("model.n_layers", len(new.layers), rule, f"Write model.n_layers={len(old.layers)}")


def changing(old: Decoder, new: Decoder, steps: Sequence[Step]) -> dict[str, str]:
    """What surely changes, before there are weights: path of a block → why it will not be called exact."""
    found: dict[str, str] = {}
    for step in steps:
        theirs, ours = None if step.source is None else _at(old, step.source), _at(new, step.path)
        if step.operator is None or ours is None:
            kept = step.name == "copy" or (ours is not None and _begins_unnoticed(ours))
            found |= {} if kept else {step.path: "nothing of the trained weights is kept"}
        elif others := unhandled(step.operator, theirs, ours):
            found[step.path] = f"other settings: {shown(others)}"
        elif step.operator is FIT[1]:
            found[step.path] = "only what has the same name and shape is copied"
    return found


def _pairs(old: Decoder, new: Decoder, growth: Growth) -> list[tuple[str, str | None]]:
    """Path of each block of the new decoder, and of its source."""
    there, here = len(old.layers), len(new.layers)
    sources = range(there) if there == here else growth.sources(there, here)
    pairs: list[tuple[str, str | None]] = [(name, name) for name in FRAME]
    for i, j in enumerate(sources):
        both = old.layers[j], new.layers[i]
        found = [part for part in LAYER_PARTS if any(getattr(layer, part) is not None for layer in both)]
        pairs += [(f"layers.{i}.{part}", f"layers.{j}.{part}") for part in found]
    pairs += [(f"mtp.{k}", f"mtp.{k}" if k < len(old.mtp) else None) for k in range(len(new.mtp))]
    pairs += [(LOOP, None if old.loop is None else LOOP)] if new.loop is not None else []
    return pairs + [(kind, kind if kind in old.inputs else None) for kind in new.inputs]


@torch.no_grad()
def _begins_unnoticed(block: nn.Module) -> bool:
    """Whether a block is a loop that visits each layer once, and does nothing between them."""
    if not isinstance(block, Loop) or block.visits > 1 or any(True for _ in block.entry.parameters()):
        return False
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    once = list(range(block.n_layers)) == block.order(1)
    return once and all(torch.equal(state, x) for state in block(x, 1, lambda x, _: x, lambda x: 2 * x))


def _step(
    path: str, source: str | None, old: Decoder, new: Decoder, named: Sequence[Named], others: Sequence[Named]
) -> Step:
    theirs, ours = None if source is None else _at(old, source), _at(new, path)
    if path == "head" and theirs is None and ours is not None:
        return Step(path, "embedding", "untie", _Untie())
    if path == LOOP and theirs is None:
        return Step(path, None, LOOP, None)
    if ours is None:
        return Step(path, None, "copy" if theirs is None else "tie" if path == "head" else "leave out", None)
    if theirs is None:
        return Step(path, None, *_filling(path, ours, [*named, *others]))
    if COPY[1].serves(theirs, ours):
        return Step(path, source, *COPY)
    chosen = next((each for each in named if each[1].serves(theirs, ours)), None)
    if chosen is not None:
        return Step(path, source, *chosen)
    serving = [each for each in others if each[1].serves(theirs, ours)]
    if len(serving) > 1:
        rule = f"several operators can make {path}: {', '.join(name for name, _ in serving)}"
        raise ConfigError("surgery.transplant", None, rule, f"Name one: surgery/transplant={serving[0][0]}")
    return Step(path, source, *(serving[0] if serving else FIT))


def _filling(path: str, ours: nn.Module, operators: Sequence[Named]) -> tuple[str, Transplant | None]:
    """What makes a block where there was none."""
    if path.rpartition(".")[2] not in OPTIONAL_PARTS:
        return "draw", None
    return next((each for each in operators if each[1].fills and each[1].serves(None, ours)), ("draw", None))


def _at(decoder: Decoder, path: str) -> nn.Module | None:
    """A part of a decoder; None if it has none, such as a tied head."""
    module: Any = decoder
    for key in path.split("."):
        module = module[int(key)] if key.isdigit() else getattr(module, key)
    return module


# --- operating --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def operate(
    old: Decoder, new: Decoder, steps: Sequence[Step], growth: Growth, batches: Callable[[], Batches], seed: int
) -> Ledger:
    """Fill the new decoder, in place, in the order of the steps, and measure what that changed.

    Args:
        old: the trained decoder, on the CPU, in fp32
        new: the decoder to fill, initialised, in fp32: lower precision would hide what is exact
        steps: from ``plan``
        growth: as given to ``plan``
        batches: gives training text (``tokens``, and ``positions`` and ``segments`` if they have them); called once, if
            some operator reads the inputs of its block
        seed: of what operators draw

    Raises:
        ConfigError: a size of the new composition does not suit an operator
    """
    sources = {step.source for step in steps if step.operator is not None and step.operator.reads_inputs}
    moments = second_moments(old, sorted(s for s in sources if s), batches()) if sources else {}
    around = new.config["max_positions"]
    done = [_apply(old, new, step, Setting(around, moments.get(step.source or ""), seed)) for step in steps]
    done += _silence(old, new, growth)
    done = [*_settle(old, new, done), *_capped(old, new), *_unlooped(old, new)]
    return measured(old, new, growth, done)


def _apply(old: Decoder, new: Decoder, step: Step, setting: Setting) -> Operation:
    block = _at(new, step.path)
    if block is None:
        return Operation(step.path, step.name, claimed=step.name == "copy")
    sizes = {name: parameter.numel() for name, parameter in block.named_parameters()}
    source = None if step.source is None else _at(old, step.source)
    if step.operator is None:
        return Operation(step.path, step.name, claimed=_begins_unnoticed(block), drawn=sum(sizes.values()))
    try:
        made = step.operator(source, block, setting)
    except BlockError as error:
        where = f"model.{step.path.rpartition('.')[2]}.{error.parameter}"
        raise ConfigError(
            where, error.value, f"{error.rule} (to make {step.path} by {step.name})", error.remedy
        ) from None
    _put(block, step, made)
    copied = sum(n for name, n in sizes.items() if name in made.copied)
    drawn = sum(n for name, n in sizes.items() if name not in made.tensors) + made.drawn
    derived = sum(sizes.values()) - copied - drawn
    if derived < 0:  # what is drawn was counted as copied
        copied, derived = copied + derived, 0
    claimed, note = _claim(step.operator, source, block, made)
    return Operation(step.path, step.name, claimed, note, copied, derived, drawn, _settings(source, block))


def _settings(old: nn.Module | None, new: nn.Module) -> dict[str, tuple[Any, Any]]:
    return {} if old is None else differences(old, new)


def _put(block: nn.Module, step: Step, made: Transplanted) -> None:
    own = block.state_dict()
    for name, tensor in made.tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            there = tuple(own[name].shape) if name in own else "nothing"
            raise TypeError(
                f"transplant {step.name} makes {name} of {tuple(tensor.shape)} for {step.path}, which has {there}"
            )
        own[name].copy_(tensor)


def _claim(operator: Transplant, old: nn.Module | None, new: nn.Module, made: Transplanted) -> tuple[bool, str]:
    """Whether the operator says that nothing changes, of what it knows, and a note."""
    others, drawn = unhandled(operator, old, new), left_drawn(operator, new, made)
    notes = [made.note, f"other settings: {shown(others)}" if others else ""]
    notes.append(f"{drawn[0]} drawn" if drawn and made.exact else "")
    return made.exact and not others and not drawn, "; ".join(note for note in notes if note)


def _silence(old: Decoder, new: Decoder, growth: Growth) -> list[Operation]:
    """Grow the depth: bring the outputs of silent layers to zero.

    They must be without effect among the old layers too: where every second layer chooses keys for the next, a copy may
    choose for layers that it stands before.
    """
    there, here = len(old.layers), len(new.layers)
    if there == here:
        return []
    silent = sorted(growth.silent(there, here))
    for i in silent:
        silence(new.layers[i])  # type: ignore[arg-type]
    among = [new, grown(old, here, growth)]
    silenced = all(_is_identity(decoder.layers[i], decoder.config) for decoder in among for i in silent)
    claimed = here - there == len(silent) and silenced
    note = f"{there} → {here} layers, {len(silent)} of them begin without effect"
    return [Operation(DEPTH, type(growth).__name__.lower(), claimed, note)]


def _is_identity(layer: nn.Module, model: Mapping[str, Any]) -> bool:
    """Whether a layer changes neither the stream nor what the layers above it are given besides."""
    T = min(SEEN, model["max_positions"])
    x, before = torch.randn(2, 1, T, model["d_model"], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    given = Pass(torch.arange(T)[None], tokens=torch.zeros(1, T, dtype=torch.int64), embedded=x)
    carry = layer(before, given)[2]
    y, _, after = layer(x, given._replace(carry=carry))
    same = all(after[name] is carry[name] or torch.equal(after[name], carry[name]) for name in after)
    return torch.equal(y, x) and same


def _settle(old: Decoder, new: Decoder, done: Sequence[Operation]) -> list[Operation]:
    """Divide by what the decoder itself multiplies by: the embeddings' scale, and the width of a tied head.

    Where that concerns parts which several operators made, they are one operation: none of them is exact alone.
    """
    scale = old.embedding_scale / new.embedding_scale
    new.embedding.weight.mul_(scale)
    ratio = scale * new.config["d_model"] / old.config["d_model"] if new.head is None else 1.0
    divided = ratio == 1 or _divide(new.norm, ratio)
    frame = [o for o in done if o.path in FRAME]
    if scale == ratio == 1 or (divided and len({o.name for o in frame if o.copied + o.derived + o.drawn}) == 1):
        return list(done)
    claimed = divided and all(o.claimed for o in frame)
    note = "embeddings in another scale" if divided else "the norm has no gain to divide a tied head's logits by"
    return [replace(o, name="rescale", claimed=claimed, note=o.note or note) if o in frame else o for o in done]


def _divide(norm: nn.Module, ratio: float) -> bool:
    """Divide what a norm gives by a number, by its own gains; whether that was possible."""
    dim = next((len(p) for p in norm.parameters() if p.ndim == 1), 0)
    x = torch.randn(4, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float32) if dim else None
    before = None if x is None else norm(x)
    for parameter in norm.parameters(recurse=False):
        parameter.div_(ratio)
    return x is not None and before is not None and torch.allclose(norm(x) * ratio, before, rtol=1e-5, atol=1e-6)


def _capped(old: Decoder, new: Decoder) -> list[Operation]:
    """Another bound of the output logits."""
    pair = old.logit_softcap, new.logit_softcap
    if pair[0] == pair[1]:
        return []
    found = {"logit_softcap": pair}
    return [Operation("logit_softcap", "fit", claimed=False, note=f"other settings: {shown(found)}", settings=found)]


def _unlooped(old: Decoder, new: Decoder) -> list[Operation]:
    """A loop that is left out."""
    if old.loop is None or new.loop is not None:
        return []
    return [Operation(LOOP, "fit", claimed=_begins_unnoticed(old.loop), note="layers are visited once")]


@torch.no_grad()
def second_moments(decoder: Decoder, paths: Sequence[str], batches: Batches) -> dict[str, Tensor]:
    """E[x xᵀ] [D,D] in fp64 of the inputs of some blocks, over all tokens of the batches."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def watch(path: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].flatten(0, -2).double()
            sums[path] = x.T @ x + sums.get(path, 0)

        return _at(decoder, path).register_forward_pre_hook(hook)  # type: ignore[union-attr]

    hooks = [watch(path) for path in paths]
    try:
        for batch in batches:
            decoder.hidden(batch["tokens"], batch.get("positions"), batch.get("segments"))
            tokens += batch["tokens"].numel()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: total / tokens for path, total in sums.items()}
