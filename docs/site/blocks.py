"""A page for every registered block and every kind: formula, parameters, cost, abilities, and who uses it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

from blockwright import registry
from blockwright.lab.abilities import D_MODEL, MEANING, SETTING, host
from blockwright.lab.catalogue import measure, table
from blockwright.lab.drawing.picture import alone, block_picture
from blockwright.registry import catalogue
from blockwright.registry.catalogue import Entry, Family
from blockwright.registry.schema import Parameter
from docs.site.markdown import Pages, fence, link, prose
from docs.site.sources import block_place

Users = Mapping[tuple[str, str], Sequence[str]]  # kind and name → presets that have the block


def add(pages: Pages, families: Sequence[Family], users: Users) -> None:
    """Add the pages of all blocks of some kinds, of these kinds, and their list."""
    pages.add("reference/blocks/index.md", _all(families))
    for family in families:
        entries = [registry.lookup(family.kind, name) for name in registry.names(family.kind)]
        pages.add(block_place(family.kind), _kind(family, entries))
        for entry in entries:
            place = block_place(entry.kind, entry.name)
            asked = f"What does `{family.kind}={entry.name}` accept?"  # as one searches
            parts = [*_chosen(family, entry), "## Parameters", asked, *_parameters(entry)]
            if family.root == "model":
                parts += [*_drawn(pages, place, entry), *_measured(entry)]
                parts += ["## Presets that have it", _presets(users.get((entry.kind, entry.name), ()))]
            pages.add(place, "\n\n".join(parts))


def _linked(entry: Entry) -> str:
    return link(f"`{entry.name}`", block_place(entry.kind, entry.name))


def _kind_link(family: Family) -> str:
    return link(f"`{family.group}`", block_place(family.kind))


def _all(families: Sequence[Family]) -> str:
    lines = [
        "# Blocks",
        "",
        "Every registered block, by the group that chooses it: `model/attention=mla` on a command line. The",
        f"{link('catalogue', 'reference/catalogue.md')} measures the blocks of a model next to each other, and",
        f"{link('add a block', 'how-to/add-a-block.md')} adds yours.",
        "",
    ]
    rows = [
        [_kind_link(family), " ".join(_linked(registry.lookup(family.kind, n)) for n in registry.names(family.kind))]
        for family in families
    ]
    return "\n".join([*lines, *table(["group", "blocks"], rows)])


def _kind(family: Family, entries: Sequence[Entry]) -> str:
    contract, module = family.contract.__name__, family.contract.__module__
    rows = [[_linked(entry), prose(entry.schema.summary)] for entry in entries]
    return "\n\n".join(
        [
            f"# Kind: {family.kind}",
            f"A block of this kind is chosen by `{family.group}=NAME`. Its contract is `{contract}` of `{module}`:",
            prose(described(family.contract)),
            "## Blocks of this kind",
            "\n".join(table(["name", "what it is"], rows)),
        ]
    )


def described(cls: type) -> str:
    """A class's docstring without what it says of arguments and errors."""
    text = inspect.getdoc(cls) or ""
    ends = [text.find(f"\n{heading}:") for heading in ("Args", "Raises", "Returns", "Attributes", "Class attributes")]
    return text[: min([end for end in ends if end >= 0], default=None)].strip()


def _chosen(family: Family, entry: Entry) -> list[str]:
    return [
        f"# {entry.kind}/{entry.name}",
        prose(described(entry.cls)),
        f"`{family.group}={entry.name}` chooses it on a command line,"
        f" `{{name: {entry.name}, …}}` in YAML. It is the class `{entry.cls.__name__}` of `{entry.cls.__module__}`,"
        f" a block of the kind {_kind_link(family)}.",
    ]


def _parameters(entry: Entry) -> list[str]:
    rows = [[f"`{p.name}`", *_typed(p), prose(p.description)] for p in entry.schema.parameters.values()]
    rows += [[f"`{p.name}`", "fixed", f"`{p.written}`", prose(p.description)] for p in entry.schema.fixed.values()]
    supplied = ", ".join(f"`{name}`" for name in sorted(entry.schema.context)) or "nothing"
    shown = "\n".join(table(["parameter", "type and range", "default", "meaning"], rows)) if rows else "It takes none."
    return [shown, f"Supplied by the composer or the parent: {supplied}."]


def _typed(parameter: Parameter) -> tuple[str, str]:
    """The type of a parameter, a link to its kind if it is a child, and its default."""
    default = f"`{catalogue.default(parameter)}`"
    if parameter.child:
        return f"{link(parameter.child, block_place(parameter.child))}{', a list' if parameter.many else ''}", default
    return f"`{parameter.type}`", default


def _drawn(pages: Pages, place: str, entry: Entry) -> list[str]:
    """A block's picture with its formulas, as ``blockwright draw KIND/NAME`` draws it."""
    file = place.removesuffix(".md") + ".svg"
    pages.files[file] = block_picture(alone(entry.kind, entry.name), equations=True)
    about = f"In a small decoder; what is hatched is cached. {link('Draw a model', 'how-to/draw.md')} explains it."
    return ["## Picture", about, f"![{entry.kind}/{entry.name}: {prose(entry.schema.summary)}](/{file})"]


def _measured(entry: Entry) -> list[str]:
    found = measure(entry.kind, *host(entry.kind, entry.name))
    setting = "".join(f", {key} {value}" for key, value in SETTING.items() if key in entry.schema.parameters)
    costs = [["parameters, with its children", f"{found.parameters:,}"]]
    if found.cache:
        costs.append(["numbers in the cache, a token", found.cache])
    ticks = [["✓" if seen else "no", tick, MEANING[tick]] for tick, seen in found.abilities.items()]
    check = f"blockwright check {entry.kind}/{entry.name}"
    return [
        "## Cost",
        f"In the same decoder, of d_model {D_MODEL}{setting}, other parameters by default:",
        "\n".join(table(["cost", "value"], costs)),
        *(["The cache of a published model in bytes is on the pages of the presets below."] if found.cache else []),
        *(["## Abilities", "\n".join(table(["", "ability", "what was tried"], ticks))] if ticks else []),
        "Its conformance tests (causality, caches, packing, gradients, sharding, …) run by",
        fence(check, "bash"),
    ]


def _presets(names: Sequence[str]) -> str:
    if not names:
        return "No preset of this distribution."
    return ", ".join(link(f"`{name}`", f"reference/presets/{name}.md") for name in names) + "."
