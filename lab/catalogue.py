"""``python -m blockwright.lab.catalogue [--check]``: docs/catalogue.md, generated from the code.

Every built-in block is put into a small decoder, counted and tested: the ticks show observed behaviour, not what a
block declares. The probes are light, one layer and a dozen tokens; they do not prove conformance.
Plug-ins are left out: the page describes this distribution, whatever else is installed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes, count_parameters, growth_beyond_windows
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating
from blockwright.registry import ConfigError, presets
from blockwright.registry.command import run_command
from blockwright.training.configuration.conf import CONF
from blockwright.training.configuration.instantiate import find_target
from blockwright.training.figure import declared

PAGE = Path(__file__).resolve().parent.parent / "docs" / "catalogue.md"
REMEDY = "python -m blockwright.lab.catalogue > docs/catalogue.md"

D_MODEL, LENGTH, VOCABULARY = 64, 12, 61
BYTES = 257  # vocabulary of the default tokenizer, for a preset that leaves it to the tokenizer
# Values for parameters with these names; all others keep their defaults.
SETTING = {"n_heads": 4, "d_ff": 128, "n_experts": 8, "window": 8, "n_devices": 4}
SETTING |= {"tile": 28, "patch": 7, "width": 64, "depth": 2, "image_token": 60}
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
    "vision": {"name": "siglip", "tile": 28, "patch": 7, "width": 64, "depth": 2, "n_heads": 4},  # for images
    "projector": "downsample_mlp",
    "tiling": "grid_2d",
}
WRAPPED = DENSE | {"selector": {"name": "block", "block_size": 3, "top_k": 2}}  # in a block of the same kind
RECURRENT = DENSE | {"attention": {"name": "gated_delta", "n_heads": 4}}
MIXTURE = DENSE | {"ffn": {"name": "moe", "n_experts": 8}}
WINDOWED = DENSE | {"attention": {"name": "shared_kv", "n_heads": 4, "window": 8}}
STREAMS = DENSE | {"residual": "mhc"}
SEEING = DENSE | {"images": {"name": "early_fusion", "image_token": 60}}


# --- a block in a decoder ---------------------------------------------------------------------------------------------


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
    # A decoder refuses what it has no place for, at the path of the kind; other errors are the block's.
    for model in (DENSE, MIXTURE, RECURRENT, WINDOWED, STREAMS, SEEING):
        try:
            decoder = compose({**model, **around, kind: node})
        except ConfigError as refusal:
            if refusal.path != f"model.{kind}":
                raise
            continue
        found = [module for module in decoder.modules() if type(module) is entry.cls]
        if found:
            return decoder.double(), found[0]
    rule = "no decoder of the catalogue has a place for it"
    raise ConfigError(f"{kind}/{name}", kind, rule, "Give a decoder in lab/catalogue.py a block that takes one")


def _run(decoder: Decoder, tokens: Tensor, training: bool = False, **given: Any) -> Tensor:
    """Logits [B,T,V]; random draws are the same each time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return decoder.train(training)(tokens, **given)


def _tokens(rows: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(1))


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# --- abilities: each runs the decoder and returns whether it has the ability -----------------------------------------


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
    for gate in (module for module in decoder.modules() if isinstance(module, Gating)):
        gate.update(torch.arange(gate.n_experts, dtype=torch.float32))
    return any(not torch.equal(before[name], buffer) for name, buffer in decoder.named_buffers())


def _routings(decoder: Decoder) -> list[Any]:
    torch.manual_seed(0)
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
    **{kind: {} for kind in ("images", "vision", "projector", "tiling")},
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


# --- the page ---------------------------------------------------------------------------------------------------------


def builtin(kind: str) -> list[str]:
    """Names registered by this distribution."""
    return [name for name in registry.names(kind) if registry.lookup(kind, name).provider == "blockwright"]


def papers(cls: type) -> str:
    """Authors with years, and arXiv numbers as links, in the order of the docstring."""
    text = (inspect.getdoc(cls) or "").partition("\nArgs:")[0]
    found = re.findall(r"[A-Z][\w-]+(?: & [A-Z][\w-]+)?(?: et al\.)? (?:19|20)\d\d\b|arXiv \d{4}\.\d{4,5}", text)
    return ", ".join(dict.fromkeys(_link(paper) for paper in found))


def _link(paper: str) -> str:
    number = paper.removeprefix("arXiv ")
    return f"[{number}](https://arxiv.org/abs/{number})" if number != paper else paper


def markdown() -> str:
    """The whole page."""
    lines = [
        "# Catalogue",
        "",
        f"<!-- generated: {REMEDY} -->",
        "",
        f"Every block of this distribution, measured and tried out at d_model {D_MODEL}"
        + "".join(f", {key} {value}" for key, value in SETTING.items()),
        "and else by default. Parameters are those of the block with its children. Choose one with",
        "`model/<kind>=<name>`; `blockwright blocks KIND/NAME` lists its parameters, plug-ins included.",
    ]
    for kind in registry.kinds():
        if names := builtin(kind):
            lines += ["", f"## {kind}", "", *_family(kind, names)]
    lines += ["", "## What the ticks mean", "", *(f"* **{tick}**: {meaning}" for tick, meaning in MEANING.items())]
    lines += ["", "## Models", "", *_presets()]
    lines += ["", "## Figures", "", *_figures()]
    return "\n".join(lines) + "\n"


def _figures() -> list[str]:
    """What the tasks and callbacks of ``conf`` declare that they log; what several declare alike is one row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    classes = {f"task={name}": registry.lookup("task", name).cls for name in builtin("task")}
    for file in sorted((CONF / "callbacks").glob("*.yaml")):
        if node := yaml.safe_load(file.read_text()).get(file.stem):
            classes[f"callbacks={file.stem}"] = find_target(node["_target_"], f"callbacks.{file.stem}")
    for option, cls in classes.items():
        for figure in declared(cls):
            names = ", ".join(f"`{name}`" for name in figure.names)
            rows.setdefault((names, figure.unit, figure.better or "neither"), []).append(f"`{option}`")
    head = ["figure", "unit", "better", "logged by"]
    return _table(head, [[*row, "every task" if len(by) > 3 else ", ".join(by)] for row, by in rows.items()])


def _family(kind: str, names: Sequence[str]) -> list[str]:
    abilities = ABILITIES.get(kind, OF_A_DECODER)
    weighs = kind == "attention"
    rows = []
    for name in names:
        entry = registry.lookup(kind, name)
        decoder, block = host(kind, name)
        size = sum(p.numel() for p in block.parameters())
        remembered = [_remembered(decoder)] if weighs else []
        ticks = ["✓" if asked(decoder) else "" for asked in abilities.values()]
        rows.append(
            [f"`{name}`", entry.schema.summary.replace("``", "`"), papers(entry.cls), f"{size:,}", *remembered, *ticks]
        )
    weighed = ["cache numbers a token adds"] if weighs else []
    return _table(["name", "what it is", "paper", "parameters", *weighed, *abilities], rows)


def _remembered(decoder: Decoder) -> str:
    try:
        one, two, many = (cache_bytes(decoder, length, torch.float32) // 4 for length in (1, 2, 1024))
    except NotImplementedError:
        return "none"
    if one == two:
        return f"fixed: {one:,} in all"
    capped = f", at most {many:,}" if many < 1024 * (two - one) else ""
    return f"{two - one:,}{capped}"


def _presets() -> list[str]:
    rows = []
    for name in presets.names():
        decoder = compose({"vocab_size": BYTES, **presets.read(name)}, device="meta")
        counted = count_parameters(decoder)
        figures = (counted.total, counted.active, counted.active - counted.embedding)
        rows.append([f"`{name}`", _described(name), *(f"{figure:,}" for figure in figures), _growth(decoder)])
    head = ["`model=`", "what it is", "parameters", "active", "active, no embedding", "cache numbers a token adds"]
    return _table(head, rows)


def _growth(decoder: Decoder) -> str:
    """What each token adds to the caches, first and where windows are full."""
    first = (cache_bytes(decoder, 2, torch.float32) - cache_bytes(decoder, 1, torch.float32)) // 4
    beyond = growth_beyond_windows(decoder)
    return f"{first:,}" if beyond == first else f"{first:,}; beyond windows {beyond:,.0f}"


def _described(preset: str) -> str:
    """A preset's summary, with arXiv numbers as links."""
    first = presets.find(preset).summary.rstrip(".")
    return re.sub(r"arXiv \d{4}\.\d{4,5}", lambda found: _link(found[0]), first)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def stale() -> str | None:
    """How the committed page differs, or None if it is current."""
    written = PAGE.read_text() if PAGE.is_file() else ""
    current = markdown()
    if written == current:
        return None
    pairs = zip([*written.splitlines(), ""], [*current.splitlines(), ""], strict=False)
    old, new = next(((a, b) for a, b in pairs if a != b), ("", ""))
    return f"docs/catalogue.md is not current. Run: {REMEDY}\n  it says:  {old}\n  the code: {new}"


def main(arguments: Sequence[str]) -> int:
    """Print the page, or with ``--check`` whether the committed one is current. Returns the exit code."""
    if list(arguments) == ["--check"]:
        fault = stale()
        print(fault or "docs/catalogue.md is current", file=sys.stderr if fault else sys.stdout)
        return 1 if fault else 0
    if arguments:
        remedy = f"Write: {REMEDY}, or python -m blockwright.lab.catalogue --check"
        raise ConfigError("command line", " ".join(arguments), "there is no such argument", remedy)
    print(markdown(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
