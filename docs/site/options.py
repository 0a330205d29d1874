"""A page for every group whose options are files (schedules, optimizers, …), ablation, ladder and control."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from blockwright.lab.ablation import definition as ablation
from blockwright.lab.calibration import control
from blockwright.lab.catalogue import table
from blockwright.lab.definitions import Files
from blockwright.lab.ladder import definition as ladder
from blockwright.registry import ConfigError
from blockwright.training.configuration import conf
from blockwright.training.configuration.instantiate import find_target
from docs.site.blocks import described
from docs.site.markdown import Pages, fence, link, prose, title

# Definitions → the command line that runs one, and the document that explains it.
KINDS: dict[str, tuple[Files, str, str]] = {
    "ablation": (ablation.FILES, "blockwright ablate {}", "how-to/ablate.md"),
    "ladder": (ladder.FILES, "blockwright ladder {}", "how-to/ladder.md"),
    "control": (control.FILES, "blockwright calibrate --only {}", "how-to/calibrate.md"),
}
ELSEWHERE = {*KINDS, "preset"}  # have pages of their own
NAMES = {  # group → how its page is called, in words that one searches by, and the document that explains it
    "scheduler": ("Learning rate schedules", "how-to/optimizers.md"),
    "optimizer": ("Optimizers", "how-to/optimizers.md"),
    "optimizer/constraint": ("Constraints of the norms of weights", "how-to/optimizers.md"),
    "trainer": ("Trainers: devices, precision, strategies", "how-to/scale.md"),
    "callbacks": ("Callbacks", "how-to/survive.md"),
    "logger": ("Loggers: TensorBoard, Weights and Biases (wandb), MLflow, CSV", "how-to/report.md"),
    "data": ("Data", "how-to/bring-your-data.md"),
    "data/tokenizer": ("Tokenizers", "how-to/bring-your-data.md"),
    "adapter": ("Adapters", "how-to/fine-tune.md"),
    "experiment": ("Experiments", "how-to/sweep.md"),
    "hparams_search": ("Hyperparameter searches", "how-to/sweep.md"),
}


def place(group: str) -> str:
    """The page of a group."""
    return f"reference/options/{group.replace('/', '_')}.md"


def add(pages: Pages) -> None:
    """Add the pages of all groups of files, and their list."""
    groups = [group for group in conf.of_files() if group.partition("/")[0] not in ELSEWHERE]
    rows = []
    for group in groups:
        heading, document = NAMES.get(group, (f"Options: {group}", ""))
        names = " ".join(f"`{file.stem}`" for file in conf.files(group))
        rows.append([link(heading, place(group)), f"`{group}=`", names])
        about = [f"`blockwright train {group}=NAME` chooses one; `{_key(group)}.KEY=VALUE` changes a value of it."]
        about += [f"{link(title(pages.texts[document]), document)} explains them."] if document else []
        pages.add(place(group), "\n\n".join([f"# {heading}", *about, *_options(group)]))
    lines = ["# Options", "The groups whose options are files, besides blocks, presets and comparisons."]
    pages.add("reference/options/index.md", "\n\n".join([*lines, "\n".join(table(["page", "group", "options"], rows))]))


def _key(group: str) -> str:
    return group.replace("/", ".")


def _options(group: str) -> Iterator[str]:
    """Each option: what its class is, and its file, whose comments say what its keys mean."""
    for file in conf.files(group):
        yield f"## {group}={file.stem}"
        yield from _of_class(file)
        yield fence(file.read_text(), "yaml")


def _of_class(file: Path) -> Iterator[str]:
    """What the classes that a file names say of themselves; those of other libraries have their own documents."""
    for target in dict.fromkeys(_targets(yaml.safe_load(file.read_text()))):
        if target.startswith("blockwright."):
            try:
                found = find_target(target, "_target_")
            except ConfigError:  # of an extra that is not installed
                continue
            yield prose(described(found) if inspect.isclass(found) else (inspect.getdoc(found) or ""))


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(target := node.get("_target_"), str):
            yield target
        for inner in node.values():
            yield from _targets(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from _targets(inner)


def definition_place(kind: str, name: str) -> str:
    """The page of a definition."""
    return f"reference/comparisons/{kind}/{name}.md"


def add_definitions(pages: Pages) -> None:
    """Add the pages of all definitions, and their list."""
    parts = ["# Ablations and ladders", "Comparisons that one command runs, from the plan to the report."]
    for kind, (files, command, document) in KINDS.items():
        rows = [[link(f"`{name}`", definition_place(kind, name)), prose(files.about(name))] for name in files.names()]
        listed = "\n".join(table(["name", "what it compares"], rows))
        parts += [f"## {kind.capitalize()}s", f"Explained in {link(title(pages.texts[document]), document)}.", listed]
        for name, found in files.known().items():
            text = _definition(f"{kind.capitalize()}: {name}", files.about(name), command.format(name), found[0])
            pages.add(definition_place(kind, name), text)
    pages.add("reference/comparisons/index.md", "\n\n".join(parts))


def _definition(heading: str, about: str, command: str, file: Path) -> str:
    parts = [f"# {heading}", prose(about), fence(command, "bash"), "## Source", fence(file.read_text(), "yaml")]
    return "\n\n".join(parts)
