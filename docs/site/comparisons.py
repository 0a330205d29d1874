"""A page for every ablation, ladder and control that an installed package defines."""

from __future__ import annotations

from pathlib import Path

from blockwright.lab.ablation import definition as ablation
from blockwright.lab.calibration import control
from blockwright.lab.catalogue import table
from blockwright.lab.definitions import Files
from blockwright.lab.ladder import definition as ladder
from docs.site.markdown import Pages, fence, link, prose, title

# Definitions → the command line that runs one, and the document that explains it.
KINDS: dict[str, tuple[Files, str, str]] = {
    "ablation": (ablation.FILES, "blockwright ablate {}", "how-to/ablate.md"),
    "ladder": (ladder.FILES, "blockwright ladder {}", "how-to/ladder.md"),
    "control": (control.FILES, "blockwright calibrate --only {}", "how-to/calibrate.md"),
}


def place(kind: str, name: str) -> str:
    """The page of a definition."""
    return f"reference/comparisons/{kind}/{name}.md"


def add(pages: Pages) -> None:
    """Add the pages of all definitions, and their list."""
    parts = ["# Ablations and ladders", "Comparisons that one command runs, from the plan to the report."]
    for kind, (files, command, document) in KINDS.items():
        rows = [[link(f"`{name}`", place(kind, name)), prose(files.about(name))] for name in files.names()]
        listed = "\n".join(table(["name", "what it compares"], rows))
        parts += [f"## {kind.capitalize()}s", f"Explained in {link(title(pages.texts[document]), document)}.", listed]
        for name, found in files.known().items():
            text = _page(f"{kind.capitalize()}: {name}", files.about(name), command.format(name), found[0])
            pages.add(place(kind, name), text)
    pages.add("reference/comparisons/index.md", "\n\n".join(parts))


def _page(heading: str, about: str, command: str, file: Path) -> str:
    parts = [f"# {heading}", prose(about), fence(command, "bash"), "## Source", fence(file.read_text(), "yaml")]
    return "\n\n".join(parts)
