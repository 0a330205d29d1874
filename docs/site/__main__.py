"""``python -m docs.site``: build the site into build/site, from the documents and from what is registered.

First its pages are written as Markdown into build/pages; that needs no extra package. Then zensical builds them, and a
link that leads nowhere is an error. Nothing outside build/ is written.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright import registry
from blockwright.registry import ConfigError
from blockwright.registry.catalogue import Family
from blockwright.registry.command import run_command
from blockwright.registry.errors import require
from docs.site import blocks, interface, options, papers, presets, sources
from docs.site.markdown import Pages
from docs.site.navigation import configuration

BUILD = sources.ROOT / "build"


def collect(names: Sequence[str], families: Sequence[Family]) -> Pages:
    """The pages of the site.

    Args:
        names: of the presets that have a page
        families: kinds whose blocks have a page
    """
    pages, models = Pages(), presets.drawn(names)
    sources.add(pages)
    blocks.add(pages, families, presets.users(models))
    presets.add(pages, models)
    options.add_definitions(pages)
    options.add(pages)
    interface.add(pages)
    papers.add(pages)
    sources.add_results(pages)
    interface.add_commands(pages)
    return pages


def write(pages: Pages, folder: Path) -> Path:
    """Write the pages and the builder's configuration into a folder; returns the latter."""
    pages.write(folder / "pages")
    file = folder / "zensical.toml"
    file.write_text(configuration(pages, sources.ROOT / "src"))
    return file


def build(file: Path) -> str:
    """Build the site, into ``site`` next to its configuration.

    Returns:
        what the builder printed

    Raises:
        ConfigError: the extra is not installed, or there is an error or a warning, which is printed
    """
    require("site", "zensical", "mkdocstrings", path="python -m docs.site")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="")
    if done.returncode or "griffe:" in done.stdout:  # a docstring that griffe cannot read is no error of zensical's
        raise ConfigError("site", str(file), "zensical did not build it without a warning", "Correct what it printed")
    return done.stdout


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: it was called with arguments, or the site cannot be built
    """
    if arguments:
        remedy = "Write: python -m docs.site"
        raise ConfigError("command line", " ".join(arguments), "there is no such argument", remedy)
    pages = collect(registry.presets.names(), registry.catalogue.families())
    build(write(pages, BUILD))
    print(f"the site is in {BUILD / 'site'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
