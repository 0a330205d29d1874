"""Checks of how a block is built, stored, counted, compiled and sharded."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Block, Kind, Placement
from blockwright.blocks.compose import assemble, compose
from blockwright.blocks.conformance.behaviour import CACHED, states
from blockwright.blocks.conformance.of_kinds import remembered_by_mix
from blockwright.blocks.conformance.setting import (
    BOUND,
    MODEL,
    ExemptError,
    PromiseError,
    Setting,
    initialised,
    must,
    must_agree,
    seed_all,
    shown,
    tokens,
)
from blockwright.blocks.cost import count_parameters, input_flops, training_flops_per_token
from blockwright.blocks.counting import Counter
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.experts import Experts
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Gating, updating
from blockwright.blocks.kernels.coded_attention import BITS
from blockwright.blocks.norm import Norm
from blockwright.blocks.readout import Readout
from blockwright.blocks.scores import Scores
from blockwright.blocks.selector.base import Selector
from blockwright.registry import BlockError


def state_dict_round_trip(setting: Setting) -> None:
    """Weights and buffers, saved and loaded into a model of another seed, restore its outputs bit for bit."""
    decoder, ids, file = setting.decoder(), tokens(2, 8), io.BytesIO()
    if any(isinstance(module, Gating) for module in decoder.modules()):
        decoder = setting.decoder(own=True)
        move_gates(decoder)
    torch.save(decoder.state_dict(), file)
    file.seek(0)
    other = initialised(setting.composed(), seed=1) if setting.brief else compose(setting.model(), seed=1)
    other.eval().load_state_dict(torch.load(file, weights_only=True))
    same = torch.equal(states(other, ids), states(decoder, ids))
    must(same, "a model that loads the state dict computes something else: state lives outside parameters and buffers")


def move_gates(decoder: Decoder) -> None:
    """Update the gates' state that changes between steps, after one of a few tokens."""
    with updating(decoder.train()):
        states(decoder, tokens(2, 13))
    decoder.eval()


def meta_build(setting: Setting) -> None:
    """A model built on the meta device, materialised and initialised is bit-identical to one built directly, and no
    buffer filled by the constructor is lost (what ``reset_parameters`` does not restore becomes 0)."""
    lazily = setting.composed_again
    direct = _built_directly(lazily.config)
    made = {n: b.clone() for n, b in direct.named_buffers()}
    initialised(direct)
    theirs = dict(lazily.named_parameters()) | dict(lazily.named_buffers())
    for name, tensor in (dict(direct.named_parameters()) | dict(direct.named_buffers())).items():
        must(name in theirs and torch.equal(theirs[name], tensor), f"{name} differs from the one built directly")
    for name, constructed in made.items():
        filled = bool(torch.isfinite(constructed).all() and constructed.any())
        lost = filled and constructed.is_floating_point() and not theirs[name].any()
        must(not lost, f"buffer {name} loses what the constructor put there: set it in reset_parameters")
    ids = tokens(2, 8)
    must(torch.equal(states(lazily.eval(), ids), states(direct.eval(), ids)), "it computes something else")


def _built_directly(model: dict[str, Any]) -> Decoder:
    """Build on the CPU, with NaN in everything that no constructor fills."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    seed_all(0)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        return assemble(model)
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def determinism(setting: Setting) -> None:
    """The same seed gives bit-identical weights and outputs, whatever was drawn before."""
    ids, modes = tokens(2, 8), (True,) if setting.brief else (True, False)
    seen: list[tuple[dict[str, Tensor], list[Tensor]]] = []
    for drawn in (0, 1):
        seed_all(drawn)
        if not setting.brief:
            decoder = compose(setting.model(), seed=3)
        else:
            decoder = setting.composed_again if drawn else setting.composed()
        seen.append((decoder.state_dict(), [states(decoder.train(mode), ids) for mode in modes]))
    (weights, before), (again, after) = seen
    for name, tensor in weights.items():
        must(torch.equal(tensor, again[name]), f"{name} differs between two models of one seed")
    must(all(map(torch.equal, before, after)), "two models of one seed compute different things")


def allocation(setting: Setting) -> None:
    """The cost card equals what the objects hold: parameters, and bytes of the cache, empty and filled, exact and
    quantised."""
    decoder, ghost = setting.decoder() if setting.brief else setting.composed().eval(), setting.composed("meta")
    held = sum(t.untyped_storage().nbytes() for t in _one_a_storage(decoder.parameters()))
    counted = count_parameters(ghost).total * 4
    must(held == counted, f"parameters hold {held:,} bytes, and {counted:,} are counted")
    every = (None, BITS[0]) if setting.brief else (None, *BITS)
    for bits in every if setting.kind in CACHED else (None,):
        try:
            caches, promised = decoder.new_caches(2, 8, bits), [c.nbytes for c in ghost.new_caches(2, 8, bits)]
        except (NotImplementedError, BlockError):  # no caches, or none with bits
            return
        _weigh(caches, promised, "an empty")
        with torch.no_grad():
            decoder.hidden(tokens(2, 8), caches=caches)
        _weigh(caches, promised, "a filled")


def remembers_what_it_says(setting: Setting) -> None:
    """Attention by scores attends once, remembers of a token the shapes that it declares, where it does, and attends
    with the selector, the scores and the readout that it is given."""
    decoder = setting.composed("meta")
    scored = [block for block in decoder.modules() if isinstance(block, Scored)]
    own = [block for block in scored if block.borrows() is None]
    measured = [block for block in own if type(block).new_cache is Scored.new_cache]
    if not measured:
        raise ExemptError("it has a cache of its own, or none")
    for block in measured:
        try:
            said, found = block.remembered(), remembered_by_mix(block)
        except NotImplementedError as error:
            raise PromiseError(str(error)) from None
        same = said.slots() == found.slots() and said.widths() == found.widths()
        must(same, f"memory() says {dict(said.shapes)}, and mix remembers {dict(found.shapes)}")
        for name, child in block.named_children():
            for attribute, contract in (("selector", Selector), ("scores", Scores), ("readout", Readout)):
                used = not isinstance(child, contract) or getattr(block, attribute) is child
                must(used, f"the child {name} is built, and not attended with: set self.{attribute} to it")


def _weigh(caches: Iterable[Any], promised: Iterable[int], state: str) -> None:
    for cache, expected in zip(caches, promised, strict=True):
        held = sum(t.untyped_storage().nbytes() for t in _one_a_storage(_tensors(cache)))
        must(held == cache.nbytes, f"{state} cache holds {held:,} bytes, but reports {cache.nbytes:,}")
        must(held == expected, f"{state} cache holds {held:,} bytes; on the meta device it reported {expected:,}")


def _one_a_storage(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({t.untyped_storage()._cdata: t for t in tensors}.values())


def _tensors(holder: Any) -> list[Tensor]:
    """Every tensor in an object's attributes and containers."""
    if isinstance(holder, Tensor):
        return [holder]
    inner = holder.values() if isinstance(holder, Mapping) else holder
    if not isinstance(inner, Iterable):
        inner = getattr(holder, "__dict__", {}).values()
    return [] if isinstance(holder, str) else [t for part in inner for t in _tensors(part)]


ROW = 128  # tokens of the step: blocked attention takes them, as one block of queries
WITHIN = 0.005  # of the FLOPs of a training step, what is counted may differ from what runs
# Kernels of a CPU that compute more than is counted: whose they are, the one that does not, and by how much of a step
# the other may in a model with such a block.
COMPUTE_MORE: dict[str, tuple[type[Block], str, float]] = {
    "rms_norm": (
        Norm,
        "torch",
        0.01,
    ),  # the gradient averages by a product with a column
    "experts": (Experts, "grouped", 0.6),  # where it is a loop, experts may be padded to the longest of a group
}


def flops(setting: Setting) -> None:
    """FLOPs counted on the meta device equal those of a forward pass on the CPU by the plain definition; and those
    counted of training a training step on the CPU with the kernels that it chooses itself, within 0.5 %. What differs
    by more is named: ``flops_within`` of a block, or a kernel that pads, within a bound of its own."""
    counts, plain = {}, {"experts": "grouped"}
    for device, kernels in (("meta", plain), ("cpu", {**plain, "attention": "reference"})):
        decoder = compose(setting.model(), device=device).choose_kernels(kernels).eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Counter() as counter:
            ids, media = shown(decoder, tokens(2, 8).to(device))
            decoder(ids, media=media)
        counts[device] = counter.total
    must(counts["meta"] == counts["cpu"], f"{counts['meta']:,} FLOPs on the meta device, {counts['cpu']:,} on the CPU")
    _step_costs_what_is_counted(setting)


def _step_costs_what_is_counted(setting: Setting) -> None:
    decoder, ghost = setting.decoder().train(), compose(setting.model(), device="meta")
    # Content beside text is of the row.
    length = ROW - shown(decoder, tokens(1, 1))[0].shape[1] + 1
    counted = ROW * training_flops_per_token(ghost, ROW)
    for block in ghost.inputs.values():
        counted += 3 * input_flops(block, block.conformance_content(1, torch.device("meta")))
    within = max((m.flops_within or WITHIN for m in decoder.modules() if isinstance(m, Block)), default=WITHIN)
    ran = _flops_of_a_step(decoder, length)
    if abs(counted / ran - 1) > within:
        more = [each for cls, _, each in COMPUTE_MORE.values() if any(isinstance(m, cls) for m in decoder.modules())]
        exact = _flops_of_a_step(decoder.choose_kernels({k: name for k, (_, name, _) in COMPUTE_MORE.items()}), length)
        off = counted / exact - 1
        must(abs(off) <= within, f"{counted:,.0f} FLOPs are counted of a training step, {exact:,} run: {off:+.1%}")
        most = 1 + within + sum(more)
        must(exact <= ran * (1 + within) and ran <= exact * most, f"{ran:,} FLOPs run where {exact:,} are needed")


def _flops_of_a_step(decoder: Decoder, length: int) -> int:
    torch.manual_seed(0)
    with Counter() as counter:
        ids, media = shown(decoder, tokens(1, length))
        if decoder.loop is not None and decoder.loop.exit is not None:
            states, routings = decoder.exits(ids, media=media)
            loss = decoder.expected_nll(states, ids)
        else:
            hidden, routings = decoder.hidden(ids, media=media)
            loss = decoder.nll(hidden, ids)
        torch.stack([loss, *(x for r in routings if r is not None for x in r.losses.values())]).sum().backward()
    decoder.zero_grad()
    return counter.total


def compiling(setting: Setting) -> None:
    """``torch.compile(fullgraph=True)`` traces the training forward pass without a graph break, and the graph computes
    the same within 1e-5. The backend is ``eager``: it needs no C++ compiler, and breaks where any backend would."""
    decoder, ids = compose(setting.model(n_layers=1)).train(), tokens(2, 8)
    expected = states(decoder, ids)
    torch._dynamo.reset()
    try:
        torch.manual_seed(0)
        given, media = shown(decoder, ids)
        compiled = torch.compile(decoder.hidden, fullgraph=True, backend="eager")
        got = compiled(given, media=media)[0][:, -ids.shape[1] :]
    except torch._dynamo.exc.TorchDynamoException as error:
        must(False, f"the graph breaks: {' '.join(str(error).split())[:400]}")
    finally:
        torch._dynamo.reset()
    must_agree(got.detach(), expected, BOUND, "the compiled model")


def parallel_plan(setting: Setting) -> None:
    """The plan places own parameters alone, each has the dimensions that its placement splits, and what two ranks
    compute of an attention or a dense ffn adds up: each has whole heads, with queries, keys and values of one head."""
    needs = {"column": 1, "row": 2, "expert": 2, "replicate": 0}
    for block in setting.instances(setting.composed("meta")).values():
        own, plan = dict(own_parameters(block)), block.parallel_plan()
        for name in plan.keys() - own.keys():
            must(False, f"it places {name}, which is not a parameter of its own")
        for name, placement in plan.items():
            must(placement in get_args(Placement), f"{name} is {placement!r}, not one of {get_args(Placement)}")
            fits = own[name].ndim >= needs[placement]
            must(fits, f"{name} {tuple(own[name].shape)} cannot be split as {placement!r}")
    if setting.kind in ("attention", "ffn"):
        for block in setting.instances(setting.composed().double().eval()).values():
            _halves_add_up(block)


def weight_kinds(setting: Setting) -> None:
    """Every own parameter of two dimensions and more, but a bias or one of torch's Linear and Embedding, is declared in
    ``weight_kinds`` of its module: dimensions do not show whether it decays or may be orthogonalised."""
    for block in setting.instances(setting.composed("meta")).values():
        for name, parameter in own_parameters(block):
            path, _, leaf = name.rpartition(".")
            owner = block.get_submodule(path)
            if parameter.ndim > 1 and "bias" not in leaf and not isinstance(owner, nn.Linear | nn.Embedding):
                kind = getattr(owner, "weight_kinds", {}).get(leaf)
                what = f"{name} {tuple(parameter.shape)}" + ("" if kind is None else f" is {kind!r}")
                must(kind in get_args(Kind), f"{what}: declare it in weight_kinds of {type(owner).__name__}")


def _halves_add_up(block: Block) -> None:
    """Where a block runs with half of each split parameter, as tensor parallelism tries, two halves give the whole."""
    x = torch.randn(2, 7, MODEL["d_model"], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given, halves = (
        Pass(torch.arange(7)[None], tokens=torch.arange(14).view(2, 7)),
        (copy.deepcopy(block), copy.deepcopy(block)),
    )
    split = False
    for path, module in block.named_modules():
        plan = module.parallel_plan() if isinstance(module, Block) else {}
        for name, whole in own_parameters(module) if isinstance(module, Block) else ():
            placement = plan.get(name, "replicate")
            if placement == "expert" or (placement in ("column", "row") and whole.shape[placement == "row"] % 2):
                return
            if placement == "replicate":
                if name.endswith("bias"):  # each rank adds it
                    whole.data.zero_()
                parts: tuple[Tensor, ...] = whole, whole
            else:
                split, parts = True, whole.chunk(2, int(placement == "row"))
            for half, part in zip(halves, parts, strict=True):
                half.get_submodule(path).get_parameter(name).data = part.data
    if not split:
        return
    with torch.no_grad():
        try:
            found = [half(x, given) for half in halves]
        except (RuntimeError, ValueError, IndexError):  # it is not split, but computed whole by each rank
            return
        one, other, whole = (y[0] if isinstance(y, tuple) else y for y in (*found, block(x, given)))
    if one.shape == whole.shape:
        must_agree(one + other, whole, 1e-9, "the sum of what two ranks compute")


def own_parameters(block: nn.Module, prefix: str = "") -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters of a block that belong to no block inside it."""
    yield from ((f"{prefix}{name}", p) for name, p in block.named_parameters(recurse=False))
    for name, child in block.named_children():
        if not isinstance(child, Block):
            yield from own_parameters(child, f"{prefix}{name}.")
