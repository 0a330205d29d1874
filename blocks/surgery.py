"""Surgery: the weights of a new composition from those of a trained one, block by block.

Both decoders are walked in parallel. A block that computes the same is copied; where a registered transplant serves,
it makes the new weights; otherwise what has the same name and shape is copied, and the rest stays drawn. Every
operation is recorded: which operator, exact or not, and how many numbers were copied, derived and drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import registry
from blocks.base import Block
from blocks.cost import signature
from blocks.decoder import LAYER_PARTS, Decoder, Layer
from blocks.growth.base import Growth
from blocks.transplant.base import Setting, Transplant, Transplanted, shapes
from registry import BlockError, ConfigError, Node, Scope

FRAME = ("embedding", "position", "norm", "head")
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


@dataclass(frozen=True)
class Operation:
    """What was done in one place.

    Args:
        path, name: as in ``Step``
        exact: whether the block computes what the old one did
        note: in a few words
        copied, derived, drawn: parameters
    """

    path: str
    name: str
    exact: bool
    note: str = ""
    copied: int = 0
    derived: int = 0
    drawn: int = 0


class _Copy(Transplant):
    """A block that computes the same."""

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        return signature(old) == signature(new)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        return Transplanted(old.state_dict(), frozenset(old.state_dict()), exact=True)


class _Fit(Transplant):
    """Another block, or other settings: copies what has the same name and shape."""

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        return True

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        there, here = old.state_dict(), shapes(new)
        same = {name: t for name, t in there.items() if here.get(name) == tuple(t.shape)}
        note = "other settings" if len(same) == len(here) == len(there) else "what has the same name and shape"
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
        ConfigError: several operators serve one block, or a named one serves none
    """
    others = automatic()
    pairs = _pairs(old, new, growth)
    steps = [_step(path, source, old, new, named, others) for path, source in pairs]
    for name, _ in named:
        if name not in {step.name for step in steps}:
            rule = "serves no block that changes here"
            raise ConfigError("surgery.transplant", name, rule, "Leave it out, or change a block that it can make")
    return steps


def _pairs(old: Decoder, new: Decoder, growth: Growth) -> list[tuple[str, str | None]]:
    """Path of each block of the new decoder, and of its source."""
    there, here = len(old.layers), len(new.layers)
    sources = range(there) if there == here else growth.sources(there, here)
    pairs: list[tuple[str, str | None]] = [(name, name) for name in FRAME]
    pairs += [(f"layers.{i}.{part}", f"layers.{j}.{part}") for i, j in enumerate(sources) for part in LAYER_PARTS]
    pairs += [(f"mtp.{k}", f"mtp.{k}" if k < len(old.mtp) else None) for k in range(len(new.mtp))]
    return pairs + ([("images", "images")] if new.images is not None else [])


def _step(
    path: str, source: str | None, old: Decoder, new: Decoder, named: Sequence[Named], others: Sequence[Named]
) -> Step:
    theirs, ours = None if source is None else _at(old, source), _at(new, path)
    if path == "head" and theirs is None and ours is not None:
        return Step(path, "embedding", "untie", COPY[1])
    if ours is None or theirs is None:
        return Step(path, None, "copy" if ours is theirs else "tie" if ours is None else "draw", None)
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
) -> list[Operation]:
    """Fill the new decoder, in place, in the order of the steps.

    Args:
        old: the trained decoder, on the CPU
        new: the decoder to fill, initialised
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
    return [*done, *_settle(old, new)]


def _apply(old: Decoder, new: Decoder, step: Step, setting: Setting) -> Operation:
    block = _at(new, step.path)
    if block is None:
        return Operation(step.path, step.name, exact=step.name == "copy")
    sizes = {name: parameter.numel() for name, parameter in block.named_parameters()}
    if step.operator is None or step.source is None:
        return Operation(step.path, step.name, exact=False, drawn=sum(sizes.values()))
    try:
        made = step.operator(_at(old, step.source), block, setting)  # type: ignore[arg-type]
    except BlockError as error:
        where = f"model.{step.path.rpartition('.')[2]}.{error.parameter}"
        raise ConfigError(
            where, error.value, f"{error.rule} (to make {step.path} by {step.name})", error.remedy
        ) from None
    own = block.state_dict()
    for name, tensor in made.tensors.items():
        own[name].copy_(tensor)
    copied = sum(n for name, n in sizes.items() if name in made.copied)
    drawn = sum(n for name, n in sizes.items() if name not in made.tensors) + made.drawn
    derived = sum(sizes.values()) - copied - drawn
    if derived < 0:  # what is drawn was counted as copied
        copied, derived = copied + derived, 0
    return Operation(step.path, step.name, made.exact, made.note, copied, derived, drawn)


def _silence(old: Decoder, new: Decoder, growth: Growth) -> list[Operation]:
    """Grow the depth: bring the outputs of silent layers to zero."""
    there, here = len(old.layers), len(new.layers)
    if there == here:
        return []
    silent = sorted(growth.silent(there, here))
    for i in silent:
        silence(new.layers[i])  # type: ignore[arg-type]
    exact = here - there == len(silent) and all(_is_identity(new.layers[i], new.config["d_model"]) for i in silent)
    note = f"{there} → {here} layers, {len(silent)} of them begin without effect"
    return [Operation("layers", type(growth).__name__.lower(), exact, note)]


def silence(layer: Layer) -> None:
    """Bring to zero what a layer adds to the residual stream."""
    for block in layer.modules():
        for name in block.residual_outputs if isinstance(block, Block) else ():
            block.get_parameter(name).zero_()
            bias = dict(block.named_parameters()).get(name.replace("weight", "bias"))
            if bias is not None:
                bias.zero_()


def _is_identity(layer: nn.Module, d_model: int) -> bool:
    x = torch.randn(1, 4, d_model, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(4)[None]
    return torch.equal(layer(x, tokens, tokens)[0], x)


def _settle(old: Decoder, new: Decoder) -> list[Operation]:
    """Account for what the decoder itself multiplies by: the embeddings' scale, and the width of a tied head."""
    done = []
    scale = old.embedding_scale / new.embedding_scale
    new.embedding.weight.mul_(scale)
    if new.head is None:
        ratio = scale * new.config["d_model"] / old.config["d_model"]
        gain = dict(new.norm.named_parameters(recurse=False))
        for parameter in gain.values():
            parameter.div_(ratio)
        if ratio != 1 and not gain:
            done.append(Operation("norm", "fit", exact=False, note="it has no gain to divide a tied head's logits by"))
    if old.logit_softcap != new.logit_softcap:
        done.append(Operation("head", "fit", exact=False, note="another logit_softcap"))
    return done


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


# --- one operator at a time -------------------------------------------------------------------------------------------


def mixed(old: Decoder, new: Decoder, growth: Growth, paths: Iterable[str]) -> Decoder:
    """The old decoder with some blocks of the new one, to see what each operator changes; shares their weights.

    Args:
        old, new: before and after ``operate``
        growth: as given to ``plan``
        paths: of the blocks of the new decoder; ``layers`` for its depth alone
    """
    taken, there, here = set(paths), len(old.layers), len(new.layers)
    sources, silent = range(there), frozenset[int]()
    if there != here and any(path.startswith("layers") for path in taken):
        sources, silent = growth.sources(there, here), growth.silent(there, here)  # type: ignore[assignment]
    layers = [copy.deepcopy(old.layers[j]) if i in silent else old.layers[j] for i, j in enumerate(sources)]
    with torch.no_grad():
        for i in silent:
            silence(layers[i])  # type: ignore[arg-type]
    probe = copy.copy(old)
    probe._modules = dict(old._modules)
    probe.layers = nn.ModuleList(
        Layer(*(getattr(new.layers[i] if f"layers.{i}.{part}" in taken else layer, part) for part in LAYER_PARTS))
        for i, layer in enumerate(layers)
    )
    for name in taken.intersection(FRAME):
        setattr(probe, name, getattr(new, name))
    if "embedding" in taken:
        probe.embedding_scale = new.embedding_scale
    return probe
