"""``python -m blockwright.lab.catalogue [--check]``: docs/catalogue.md, generated from the code.

Every built-in block is put into a small decoder, counted and tested (lab/abilities.py): the ticks show observed
behaviour, not what a block declares. Plug-ins are left out: the page describes this distribution, whatever else is
installed.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import cache_bytes, count_parameters, growth_beyond_windows
from blockwright.blocks.decoder import Decoder
from blockwright.lab.abilities import ABILITIES, D_MODEL, MEANING, OF_A_DECODER, SETTING, host
from blockwright.registry import ConfigError, presets
from blockwright.registry.command import run_command
from blockwright.training.configuration import conf
from blockwright.training.configuration.instantiate import find_target
from blockwright.training.figure import declared

PAGE = Path(__file__).resolve().parent.parent / "docs" / "catalogue.md"
REMEDY = "python -m blockwright.lab.catalogue > docs/catalogue.md"

BYTES = 257  # vocabulary of the default tokenizer, for a preset that leaves it to the tokenizer


def builtin(kind: str) -> list[str]:
    """Names registered by this distribution."""
    return [name for name in registry.names(kind) if registry.lookup(kind, name).provider == "blockwright"]


def papers(cls: type) -> str:
    """Authors with years, and arXiv numbers as links, in the order of the docstring."""
    text = (inspect.getdoc(cls) or "").partition("\nArgs:")[0]
    found = re.findall(r"[A-Z][\w-]+(?:(?: &)? [A-Z][\w-]+)*(?: et al\.)? (?:19|20)\d\d\b|arXiv \d{4}\.\d{4,5}", text)
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
    for file in conf.files("callbacks"):
        node = yaml.safe_load(file.read_text()).get(file.stem)
        if node and node["_target_"] != "???":
            classes[f"callbacks={file.stem}"] = find_target(node["_target_"], f"callbacks.{file.stem}")
    for option, cls in classes.items():
        for figure in declared(cls):
            names = ", ".join(f"`{name}`" for name in figure.names)
            rows.setdefault((names, figure.unit, figure.better or "neither"), []).append(f"`{option}`")
    head = ["figure", "unit", "better", "logged by"]
    return table(head, [[*row, "every task" if len(by) > 3 else ", ".join(by)] for row, by in rows.items()])


@dataclass(frozen=True)
class Measured:
    """What a block costs and can do, in the small decoder of lab/abilities.py.

    Args:
        parameters: of the block with its children
        cache: numbers that its decoder caches per token, in words; None for a kind that does not decide them
        abilities: tick → whether a probe saw it
    """

    parameters: int
    cache: str | None
    abilities: dict[str, bool]


def measure(kind: str, decoder: Decoder, block: nn.Module) -> Measured:
    """Count a block and probe it.

    Args:
        kind: of the block
        decoder, block: as ``host`` gives them
    """
    cache = _remembered(decoder) if kind == "attention" else None
    abilities = {tick: asked(decoder) for tick, asked in ABILITIES.get(kind, OF_A_DECODER).items()}
    return Measured(sum(p.numel() for p in block.parameters()), cache, abilities)


def _family(kind: str, names: Sequence[str]) -> list[str]:
    rows = []
    for name in names:
        measured = measure(kind, *host(kind, name))
        remembered = [measured.cache] if measured.cache else []
        ticks = ["✓" if seen else "" for seen in measured.abilities.values()]
        rows.append([*told(kind, name), f"{measured.parameters:,}", *remembered, *ticks])
    weighed = ["cache numbers per token"] if kind == "attention" else []
    return table(["name", "what it is", "paper", "parameters", *weighed, *ABILITIES.get(kind, OF_A_DECODER)], rows)


def told(kind: str, name: str) -> list[str]:
    """What a block's row says before anything is measured: its name, what it is, and its papers."""
    entry = registry.lookup(kind, name)
    return [f"`{name}`", entry.schema.summary.replace("``", "`"), papers(entry.cls)]


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
        # What each token adds to the caches, first and where windows are full
        first = (cache_bytes(decoder, 2, torch.float32) - cache_bytes(decoder, 1, torch.float32)) // 4
        beyond = growth_beyond_windows(decoder)
        growth = f"{first:,}" if beyond == first else f"{first:,}; beyond windows {beyond:,.0f}"
        rows.append([f"`{name}`", described(name), *(f"{figure:,}" for figure in figures), growth])
    head = ["`model=`", "what it is", "parameters", "active", "active, no embedding", "cache numbers per token"]
    return table(head, rows)


def described(preset: str) -> str:
    """A preset's summary, with arXiv numbers as links."""
    first = presets.find(preset).summary.rstrip(".")
    return re.sub(r"arXiv \d{4}\.\d{4,5}", lambda found: _link(found[0]), first)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
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
