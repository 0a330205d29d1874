"""``python -m docs.site``: build the site into build/site, from the documents and from what is registered.

First its pages are written as Markdown into build/pages; that needs no extra package. Then zensical builds them strictly:
a link that leads nowhere is an error. Nothing outside build/ is written.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright.registry import ConfigError
from blockwright.registry.command import run_command
from blockwright.registry.extras import require
from docs.site import blocks, commands, comparisons, interface, papers, presets, results, sources
from docs.site.navigation import configuration
from docs.site.pages import Pages

BUILD = sources.ROOT / "build"


def collect() -> Pages:
    """All pages of the site."""
    pages = Pages()
    models = presets.drawn()
    sources.add(pages)
    blocks.add(pages, presets.users(models))
    presets.add(pages, models)
    comparisons.add(pages)
    interface.add(pages)
    papers.add(pages)
    results.add(pages)
    commands.add(pages)
    return pages


def write(pages: Pages, folder: Path) -> Path:
    """Write the pages and the builder's configuration into a folder; returns the latter."""
    pages.write(folder / "pages")
    file = folder / "zensical.toml"
    file.write_text(configuration(pages, sources.ROOT / "src"))
    return file


def build(file: Path) -> None:
    """Build the site, into ``site`` next to its configuration.

    Raises:
        ConfigError: the extra is not installed, or zensical finds an error or a warning; it prints which
    """
    require("site", "zensical", "mkdocstrings", path="python -m docs.site")
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(file)])
    if done.returncode:
        raise ConfigError("site", str(file), "zensical did not build it", "Correct what it printed above")


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: it was called with arguments, or the site cannot be built
    """
    if arguments:
        raise ConfigError("command line", " ".join(arguments), "there is no such argument", "Write: python -m docs.site")
    build(write(collect(), BUILD))
    print(f"the site is in {BUILD / 'site'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
