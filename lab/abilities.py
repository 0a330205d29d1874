"""What a block can do, by trial: every built-in block in a small decoder, and probes of its abilities.

The probes are light, one layer and a dozen tokens; they do not prove conformance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import updating
from blockwright.blocks.input import is_input
from blockwright.registry import ConfigError

D_MODEL, LENGTH, VOCABULARY = 64, 12, 61
# Values for parameters with these names; all others keep their defaults.
SETTING = {"rows": 97, "n_heads": 4, "d_ff": 128, "n_experts": 8, "window": 8, "n_devices": 4}
SETTING |= {"tile": 28, "patch": 7, "width": 64, "depth": 2, "image_token": 60}
# Parts of a decoder that only some have: kind → the block that its contract gives as an example for the catalogue.
EXAMPLES = {
    kind: contract.catalogue_example
    for kind in registry.kinds()
    if hasattr(contract := registry.catalogue.find_family(kind).contract, "catalogue_example")
}
DENSE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": D_MODEL,
    "n_layers": 1,
    "max_positions": 64,
    "init": {"std": 0.15},
    "attention": {"name": "mha", "n_heads": 4},
    "position": "none",
    "ffn": {"name": "swiglu", "d_ff": 128},
    "norm": "rmsnorm",
    "residual": "prenorm",
    "gating": "softmax_topk",  # for an ffn that requires one
    "experts": {"name": "swiglu", "d_ff": 128},
    **{kind: node for kind, node in EXAMPLES.items() if not is_input(kind)},
}
WRAPPED = DENSE | {"selector": {"name": "block", "block_size": 3, "top_k": 2}}  # in a block of the same kind
GROUPED = DENSE | {"attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 1}}
RECURRENT = DENSE | {"attention": {"name": "gated_delta", "n_heads": 4}}
MIXTURE = DENSE | {"ffn": {"name": "moe", "n_experts": 8}}
WINDOWED = DENSE | {"attention": {"name": "shared_kv", "n_heads": 4, "window": 8}}
STREAMS = DENSE | {"residual": "mhc"}
LOOPED = DENSE | {"loop": {"name": "cycle", "visits": 3}}
WITH_INPUTS = DENSE | EXAMPLES
LENDING = DENSE | {"n_layers": 2, "overrides": [{"layers": 0, "kv_source": "lent"}]}  # for a layer that borrows


def host(kind: str, name: str) -> tuple[Decoder, nn.Module]:
    """A small decoder with the block in it, and the block.

    Raises:
        ConfigError: no small decoder has a place for it
    """
    entry = registry.lookup(kind, name)
    node = {"name": name} | {key: value for key, value in SETTING.items() if key in entry.schema.parameters}
    wrapped = [p for p in entry.schema.children.values() if p.child == kind and not p.optional]
    node |= {p.name: WRAPPED[kind] for p in wrapped}  # from scope, it would contain itself
    around = {"position": "rope"} if kind == "attention" else {}
    # A decoder refuses what it has no place for, and an owner what does not fit it, at the path of the kind; other
    # errors are the block's.
    models = DENSE, GROUPED, MIXTURE, RECURRENT, WINDOWED, STREAMS, LOOPED, WITH_INPUTS, LENDING
    own = ({**model, **around, kind: node} for model in models)
    for model in (*own, *_as_child(kind, node)):
        try:
            decoder = compose(model)
        except ConfigError as refusal:
            if not refusal.path.endswith(f".{kind}"):
                raise
            continue
        found = [module for module in decoder.modules() if type(module) is entry.cls]
        if found:
            return decoder.double(), found[0]
    rule = "no decoder of the catalogue has a place for it"
    raise ConfigError(f"{kind}/{name}", kind, rule, "Give a decoder in lab/abilities.py a block that takes one")


def _as_child(kind: str, node: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The dense decoder with a block for a parameter of one of its own, which need not have the name of the kind."""
    for of_model, outer in DENSE.items():
        if of_model in registry.kinds():
            name = outer if isinstance(outer, str) else outer["name"]
            written = {} if isinstance(outer, str) else outer
            children = registry.lookup(of_model, name).schema.children.values()
            taken = (p.name for p in children if p.child == kind)
            yield from ({**DENSE, of_model: {"name": name, **written, parameter: node}} for parameter in taken)


def _run(decoder: Decoder, tokens: Tensor, training: bool = False, **given: Any) -> Tensor:
    """Logits [B,T,V]; random draws are the same each time."""
    torch.default_generator.manual_seed(0)  # of this device alone: of all, it takes as long as a small decoder
    with torch.no_grad():
        return decoder.train(training)(tokens, **given)


def _tokens(rows: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def causal(decoder: Decoder, training: bool = False) -> bool:
    """Whether later tokens have no effect on a token."""
    tokens, seen = _tokens(4), LENGTH // 2
    before = _run(decoder, tokens, training)[:, :seen]
    for shift in range(1, VOCABULARY, 7):  # not every competitor displaces a token from an expert
        others = tokens.clone()
        others[:, seen:] = (others[:, seen:] + shift) % VOCABULARY
        if not _same(before, _run(decoder, others, training)[:, :seen]):
            return False
    return True


def causal_in_training(decoder: Decoder) -> bool:
    """``causal`` in training, when gates may balance and drop."""
    return causal(decoder, training=True)


def caches(decoder: Decoder) -> bool:
    """Whether token-by-token decoding equals one pass."""
    tokens = _tokens(2)
    try:
        memory = decoder.new_caches(len(tokens), LENGTH)
    except NotImplementedError:
        return False
    steps = [_run(decoder, tokens[:, t : t + 1], caches=memory) for t in range(LENGTH)]
    return _same(torch.cat(steps, 1), _run(decoder, tokens))


def packs(decoder: Decoder) -> bool:
    """Whether two documents packed into one sequence give what they give separately."""
    documents = _tokens(2)
    positions = torch.arange(LENGTH).repeat(2)[None]
    segments = torch.arange(2).repeat_interleave(LENGTH)[None]
    packed = _run(decoder, documents.view(1, -1), positions=positions, segments=segments)
    apart = torch.cat([_run(decoder, document[None]) for document in documents], 1)
    return _same(packed, apart)


def ordered(decoder: Decoder) -> bool:
    """Whether the order of earlier tokens matters: in one layer without positions it does not."""
    tokens = torch.arange(LENGTH)[None]
    shuffled = torch.cat((tokens[:, :-1].flip(1), tokens[:, -1:]), 1)
    return not _same(_run(decoder, tokens)[:, -1], _run(decoder, shuffled)[:, -1])


def routes(decoder: Decoder) -> bool:
    """Whether tokens are routed to experts."""
    return any(routing is not None for routing in _routings(decoder))


def complete(decoder: Decoder) -> bool:
    """Whether every token reaches the same number of experts, in training too."""
    routings = [routing for routing in _routings(decoder) if routing is not None]
    return bool(routings) and all(bool((r.experts < len(r.load)).all()) for r in routings)


def penalises(decoder: Decoder) -> bool:
    """Whether it adds a loss in training."""
    return any(routing is not None and bool(routing.losses) for routing in _routings(decoder))


def adapts(decoder: Decoder) -> bool:
    """Whether uneven load changes state between optimizer steps."""
    before = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    with updating(decoder), torch.no_grad():
        _routings(decoder)
    return any(not torch.equal(before[name], buffer) for name, buffer in decoder.named_buffers())


def _routings(decoder: Decoder) -> list[Any]:
    torch.default_generator.manual_seed(0)  # of this device alone: of all, it takes as long as a small decoder
    return decoder.train().hidden(_tokens(4))[1]


Ability = Callable[[Decoder], bool]
OF_A_DECODER: dict[str, Ability] = {
    "causal": causal,
    "causal in training": causal_in_training,
    "decodes by cache": caches,
    "packs": packs,
}
OF_A_MIXTURE: dict[str, Ability] = {"routes": routes, "no token dropped": complete, "adds a loss": penalises}
ABILITIES: dict[str, dict[str, Ability]] = {
    "attention": {**OF_A_DECODER, "uses position": ordered},
    "position": {**OF_A_DECODER, "tells the order": ordered},
    "ffn": {**OF_A_DECODER, "routes": routes},
    "gating": {**OF_A_DECODER, **OF_A_MIXTURE, "adapts": adapts},
    "balance": OF_A_MIXTURE,
    "dropping": {**OF_A_DECODER, **OF_A_MIXTURE},
    **{kind: {} for kind in EXAMPLES},
}
MEANING = {
    "causal": "what follows a token changes nothing for it",
    "causal in training": "the same while gates balance and drop",
    "decodes by cache": "a token at a time gives what the whole pass gives",
    "packs": "documents packed into one sequence give what they give apart",
    "uses position": "with rotary positions, the order of earlier tokens tells",
    "tells the order": "it lets one layer tell the order of earlier tokens",
    "routes": "tokens are sent to experts",
    "no token dropped": "every token reaches as many experts as any other, in training too",
    "adds a loss": "in training, to even out the load",
    "adapts": "uneven load moves a bias between optimizer steps",
}
