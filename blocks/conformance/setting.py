"""The small decoder in which a block is tested, put together from its registration.

No tested block is known by name. A block's required parameters are filled from a table by parameter name, else by type;
special needs are declared in ``conformance_settings``. A kind that a decoder does not require (experts, balance, …) is
placed in the first registered block that takes it as a child.
"""

from __future__ import annotations

import copy
import functools
import json
import random
import typing
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.base import Block
from blockwright.blocks.compose import assemble, check, compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import initialise
from blockwright.blocks.input import Input, Media, is_input
from blockwright.blocks.layer import OPTIONAL_PARTS
from blockwright.blocks.loop import Loop
from blockwright.registry import ConfigError, Node
from blockwright.registry.catalogue import Entry, find_family
from blockwright.registry.schema import Parameter


class PromiseError(AssertionError):
    """The block does not satisfy the check's docstring; the message says what was seen."""


class ExemptError(Exception):
    """The check does not apply to this block; the message says why."""


def must(holds: bool, reason: str) -> None:
    """Raise ``PromiseError`` with the reason unless ``holds``."""
    if not holds:
        raise PromiseError(reason)


def must_agree(got: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Raise ``PromiseError`` unless two tensors have the same shape and differ by at most ``bound``."""
    must(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    must(bool(torch.isfinite(got).all() and torch.isfinite(expected).all()), f"{what}: values that are not finite")
    off = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    must(off <= bound, f"{what}: off by {off:.3g}, at most {bound:g} allowed")


MODEL: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 48,
    "max_positions": 256,
    "init": {"std": 0.2, "depth_scaled": False},  # keeps activations near 1 at this width
}
# Blocks around the tested one; every decoder has one of each of these kinds.
BOUND = 1e-5  # fp32, two layers: another order of summation differs by about 1e-6
FRAME = {"attention": "gqa", "position": "rope", "ffn": "swiglu", "norm": "rmsnorm", "residual": "prenorm"}
# Parts of a mixture of experts, for testing one of them.
PARTS = {"gating": "softmax_topk", "experts": "swiglu"}
# Sizes by parameter name; defaults are for real models, and would be slow or have no effect in a small one.
SIZES = {"d_ff": 24, "n_heads": 4, "n_experts": 8, "n_devices": 4, "window": 5}
# Kinds whose blocks know nothing of other layers: one layer is enough in brief.
OF_ONE_LAYER: tuple[str, ...] = ("ffn", "experts", "gating", "balance", "norm", "qk_norm", "output_gate", "scores")
OF_ONE_LAYER += ("readout", "decay", "convolution", "dropping", "mixing")
REQUIRED = {"top_k": 2, "factor": 4.0, "top_devices": 2, "n_groups": 4, "top_groups": 2}


@dataclass(frozen=True)
class Setting:
    """A registered block, and the decoders in which it is tested.

    Args:
        kind, name: as registered
        written: its node; None for a small one with default values
        brief: whether a check tries a few of the places and lengths that it could, chosen to find the same faults
    """

    kind: str
    name: str
    written: Mapping[str, Any] | None = None
    brief: bool = False

    @property
    def entry(self) -> Entry:
        return registry.lookup(self.kind, self.name)

    def node(self) -> dict[str, Any]:
        """The block's own configuration."""
        return filled(self.entry) if self.written is None else dict(self.written)

    def model(self, node: Mapping[str, Any] | None = None, n_layers: int | None = None) -> dict[str, Any]:
        """The configuration of a decoder around the block, or around another node of its kind."""
        return json.loads(self._usual) if node is None and n_layers is None else self._model(node, n_layers)

    @functools.cached_property
    def _usual(self) -> str:
        """JSON of the configuration around the block as it is."""
        return json.dumps(self._model(None, None))

    def _model(self, node: Mapping[str, Any] | None, n_layers: int | None) -> dict[str, Any]:
        n_layers = n_layers or (1 if self.brief and (self.kind in OF_ONE_LAYER or self.of_input) else 2)
        own = dict(node or self.node())
        around: dict[str, Any] = {}
        for _, entry, _ in registry.walk(self.kind, Node(own, self.kind), {}):
            around |= entry.cls.conformance_model  # type: ignore[attr-defined]
        return {**placed(self.kind, own), **around, "n_layers": n_layers}

    def decoder(
        self, node: Mapping[str, Any] | None = None, *, dtype: torch.dtype = torch.float32, own: bool = False
    ) -> Decoder:
        """A new decoder in evaluation mode. Gains and biases are moved off their initial values.

        Args:
            node: in place of the block's
            dtype: of its parameters
            own: whether the check changes it, its mode and gradients aside; in brief the others share one of each dtype
        """
        if self.brief and node is None and not own:
            if dtype not in self._shared:
                self._shared[dtype] = self.decoder(dtype=dtype, own=True)
            return self._shared[dtype].eval()
        model = self._usual if node is None else json.dumps(self.model(node))
        return _copied(_prototype(model, (self.entry.cls,))).to(dtype).eval()

    def last_decoder(self, dtype: torch.dtype) -> Decoder:
        """As ``decoder(own=True)``; in brief the shared one, which later checks do not get."""
        return self._shared.pop(dtype) if dtype in self._shared else self.decoder(dtype=dtype, own=True)

    @functools.cached_property
    def _shared(self) -> dict[torch.dtype, Decoder]:
        return {}

    def composed(self, device: str = "cpu") -> Decoder:
        """A decoder as it is composed; in brief all checks share the one on the meta device, and copy the other."""
        if not self.brief:
            return compose(self.model(), device=device)
        made = _composed(self._usual, (self.entry.cls,), device)
        return made if device == "meta" else _copied(made)

    @functools.cached_property
    def composed_again(self) -> Decoder:
        """One that is composed by itself, on the CPU, after global seeds of 0; no check changes its weights."""
        seed_all(0)
        config = self.composed("meta").config if self.brief else check(self.model())
        with torch.device("meta"):
            made = assemble(config)
        return initialised(made.to_empty(device="cpu"))

    def instances(self, decoder: Decoder) -> dict[str, Block]:
        """The instances of the tested block in the decoder: qualified name → block."""
        found = {n: m for n, m in decoder.named_modules() if type(m) is self.entry.cls and isinstance(m, Block)}
        must(bool(found), f"the decoder built for it contains no {self.kind} {self.name!r}")
        return found

    @functools.cached_property
    def of_input(self) -> bool:
        """Whether the block is an input of its decoder, or a part of one."""
        kind = self.kind
        while not _of_decoder(kind):
            kind = host_of(kind)[0].kind
        return is_input(kind)

    @property
    def causal(self) -> bool:
        """Whether no block in its decoder declares that later tokens may matter."""
        return all(m.causal for m in self.decoder().modules() if isinstance(m, Block))


@functools.lru_cache(maxsize=8)
def _composed(model: str, tested: tuple[type], device: str) -> Decoder:
    if device == "meta":
        return compose(json.loads(model), device="meta")
    seed_all(1)  # others than ``composed_again``, which must be equal nevertheless
    return initialised(_copied(_composed(model, tested, "meta")).to_empty(device=device))


def seed_all(seed: int) -> None:
    """Seed the global generators, from which a block must draw nothing."""
    torch.manual_seed(seed)
    random.seed(seed)


def initialised(decoder: Decoder, seed: int = 0) -> Decoder:
    initialise(decoder, **decoder.config["init"], n_layers=decoder.config["n_layers"], seed=seed)
    return decoder


def _copied(decoder: Decoder) -> Decoder:
    """A deep copy that does not look into the many empty containers of modules, which takes half of the time."""
    holders = (value for module in decoder.modules() for value in vars(module).values())
    empty = {id(h): type(h)() for h in holders if type(h) in (dict, OrderedDict, set) and not h}
    return copy.deepcopy(decoder, empty)


@functools.lru_cache(maxsize=64)
def _prototype(model: str, tested: tuple[type]) -> Decoder:
    """Cached per configuration and class: a name may be registered again, in a notebook or a test."""
    decoder = _copied(_composed(model, tested, "cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float32), alpha=0.1)
    return decoder


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """[B,T] random token ids."""
    return torch.randint(MODEL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def shown(decoder: Decoder, ids: Tensor) -> tuple[Tensor, Media]:
    """Tokens [B,T], behind the places of content of each input of the decoder, and that content: then every check of
    the states of these tokens reaches the inputs."""
    media = {kind: block.conformance_content(len(ids), ids.device) for kind, block in decoder.inputs.items()}
    places = []
    for kind, block in decoder.inputs.items():
        places.append(ids.new_full((len(ids), block.count(media[kind]) // len(ids)), block.token))
        ids = ids.where(ids != block.token, 0)
    return torch.cat((*places, ids), 1), media


@contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[list[tuple[Any, tuple[Tensor, ...], Any]]]:
    """Records (module, inputs, output) of every call of the modules."""
    seen: list[tuple[Any, tuple[Tensor, ...], Any]] = []
    handles = [m.register_forward_hook(lambda m, given, got: seen.append((m, given, got))) for m in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def filled(entry: Entry) -> dict[str, Any]:
    """A small node of a block: its required parameters, its sizes, and its ``conformance_settings``."""
    known = {**REQUIRED, **SIZES}
    node: dict[str, Any] = {"name": entry.name, **entry.cls.conformance_settings}  # type: ignore[attr-defined]
    for p in entry.schema.parameters.values():
        if p.name in node:
            continue
        if p.child:
            inner = {**FRAME, **PARTS}.get(p.child)
            if p.required and p.child == entry.kind and inner:  # by outward search it would find itself
                node[p.name] = filled(registry.lookup(p.child, inner))
        elif p.name in SIZES and p.fault(SIZES[p.name]) is None:
            node[p.name] = SIZES[p.name]
        elif p.required:
            node[p.name] = known[p.name] if p.name in known else _guess(entry, p)
    return node


def _guess(entry: Entry, p: Parameter) -> Any:
    literals = [a for a in typing.get_args(p.hint) if not isinstance(a, type)]
    for value in (*literals, 2, 0.5, True, "a"):
        if p.fault(value) is None:
            return value
    rule = f"the conformance kit knows no {p.type}"
    remedy = f"Give the class a ClassVar: conformance_settings = {{{p.name!r}: …}}"
    raise ConfigError(f"{entry.kind}/{entry.name}.{p.name}", "???", rule, remedy)


def placed(kind: str, node: dict[str, Any]) -> dict[str, Any]:
    """A decoder's configuration that uses this node."""
    around = {**FRAME, **PARTS}
    if _of_decoder(kind):
        return {**MODEL, **{k: filled(registry.lookup(k, name)) for k, name in around.items()}, kind: node}
    host, parameter = host_of(kind)
    return placed(host.kind, {**filled(host), parameter: node})


def _of_decoder(kind: str) -> bool:
    """Whether blocks of a kind are parts of a decoder themselves, not children."""
    return kind in (*FRAME, *OPTIONAL_PARTS) or issubclass(find_family(kind).contract, Input | Loop)


def host_of(kind: str) -> tuple[Entry, str]:
    """The block that takes a child of this kind, and its parameter; usual blocks are preferred.

    Raises:
        ConfigError: there is none
    """
    usual = {**FRAME, **PARTS}
    entries = [registry.lookup(k, n) for k in registry.kinds() for n in registry.names(k) if k != kind]
    for entry in sorted(entries, key=lambda e: usual.get(e.kind) != e.name):
        for p in entry.schema.children.values():
            if p.child == kind:
                return entry, p.name
    raise ConfigError("kind", kind, "no registered block takes a child of this kind", "Register one that does")
