"""The documents of the repository as pages: where each goes, and where its links lead.

A document links to files of the repository, so that it can be read there. On the site a link to a block's file leads to
the block's page, one to a document to its page, one to a picture to the picture; other files are shown as pages. One
page lists all measurements.
"""

from __future__ import annotations

import functools
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from blockwright import registry
from docs.site.markdown import Pages, fence, link, prose, relinked, title

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "pages"  # pages of the site alone
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/how-to/*.md", "docs/reference/*.md"),
    *(f"{core}/README.md" for core in ("registry", "blocks", "training", "lab")),
    *("plugins/*.md", "plugins/*/*.md", "benchmarks/results/**/*.md"),
)
GENERATED = {"README.md", "docs/api.md"}  # the site has another page for what these are about
DATA = ("svg", "png", "csv", "json")  # files that a browser shows
# Path of a file or folder → place of its page; the first that matches.
PLACES = [
    (r"README\.md|docs|", "index.md"),
    (r"CONTRIBUTING\.md", "project/contributing.md"),
    (r"CHANGELOG\.md", "project/changes.md"),
    (r"docs/api\.md", "reference/interface/index.md"),
    (r"docs/catalogue\.md", "reference/catalogue.md"),
    (r"docs/(.+/)README\.md", r"\1index.md"),
    (r"docs/(explanation|security)\.md", r"explanation/\1.md"),
    (r"(registry|blocks|training|lab)/README\.md", r"explanation/\1.md"),
    (r"docs/(.+)\.md", r"\1.md"),
    (r"plugins(?:/README\.md)?", "reference/plug-ins.md"),
    (r"plugins/(\w+)(?:/README\.md)?", r"how-to/\1.md"),
    (r"plugins/\w+/(\w+)\.md", r"results/\1.md"),
    (r"benchmarks/results/(ablation|ladder)s/(\w+)/report/report\.md", r"results/\1s/\2.md"),
    (r"benchmarks/results/((?:.+/)?)README\.md", r"results/\1index.md"),
    (r"benchmarks/results/(.+)\.md", r"results/\1.md"),
    (r"(?:conf|plugins/\w+)/presets?/(\w+)\.yaml", r"reference/presets/\1.md"),
    (r"(?:conf|plugins/\w+)/(ablation|ladder|control)s?/(\w+)\.yaml", r"reference/comparisons/\1/\2.md"),
    (rf"(.+\.(?:{'|'.join(DATA)}))", r"files/\1"),
    (r"(.+)", r"source/\1.md"),
]


@functools.cache
def _blocks() -> dict[str, str]:
    """File of a registered block → its page."""
    return {
        f"{entry.cls.__module__.removeprefix('blockwright.').replace('.', '/')}.py": block_place(kind, name)
        for kind in registry.kinds(None)
        for name in registry.names(kind)
        for entry in [registry.lookup(kind, name)]
    }


def block_place(kind: str, name: str = "index") -> str:
    """The page of a block, or of its kind."""
    return f"reference/blocks/{kind}/{name}.md"


def place(path: str) -> str:
    """The page of a file or folder of the repository, from its root."""
    if path in _blocks():
        return _blocks()[path]
    for pattern, found in PLACES:
        if match := re.fullmatch(pattern, path):
            return match.expand(found)
    raise AssertionError("the last pattern matches every path")


def documents() -> Iterator[str]:
    """The paths of the documents that are pages, from the root of the repository."""
    for pattern in DOCUMENTS:
        for file in sorted(ROOT.glob(pattern)):
            yield file.relative_to(ROOT).as_posix()


def add(pages: Pages) -> None:
    """Add the documents, those of the site alone, and the files that they show or link to."""
    for path in documents():
        if path not in GENERATED:
            pages.add(place(path), _page(path, pages))
    for file in sorted(HERE.rglob("*.md")):
        pages.add(file.relative_to(HERE).as_posix(), file.read_text())


def _page(path: str, pages: Pages) -> str:
    """A document whose links lead to pages; the files behind them are added."""
    folder = posixpath.dirname(path)

    def lead(target: str) -> str:
        linked, hash_, anchor = target.partition("#")
        linked = posixpath.normpath(posixpath.join(folder, linked)).removeprefix(".")
        to = place(linked)
        if to.startswith("files/"):
            pages.files[to] = ROOT / linked
        elif to.startswith("source/"):
            pages.texts.setdefault(to, _source(linked))
        return f"/{to}{hash_}{anchor}"

    # A report without links to the folders of its runs, which are not in the repository
    return relinked(re.sub(r"\[([^\]]+)\]\(\.\./\d+/?\)", r"\1", (ROOT / path).read_text()), lead)


def _source(path: str) -> str:
    """A file as a page, or the names in a folder."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(name for name in os.listdir(file) if name[0] not in "._")
        return "\n".join([f"# {path}", "", *(f"* `{name}`" for name in names)])
    language = {".py": "python", ".yaml": "yaml"}.get(file.suffix, "text")
    return f"# {path}\n\n{fence(file.read_text(), language)}"


PLACE = "results/index.md"
COMPARISONS = ("results/ablations/", "results/ladders/")
HEAD = f"""\
# Results

Each page names the machine, the versions and the date, and shows ratios from one run with alternated repeats.
{link("Measure speeds", "how-to/benchmarks.md")} explains how they are measured and how to repeat them, and
{link("read the report", "how-to/report.md")} what the verdicts and intervals of an ablation mean.
"""


def add_results(pages: Pages) -> None:
    """Add the page. The measurements are already among the pages."""
    places = sorted(place for place in pages.texts if place.startswith("results/"))
    reports = [place for place in places if place.startswith(COMPARISONS)]
    speeds = [place for place in places if place not in reports]
    parts = [
        HEAD.strip(),
        "## Ablations and ladders",
        _listed(pages, reports),
        "## Speeds and costs",
        _listed(pages, speeds),
    ]
    pages.add(PLACE, "\n\n".join(parts))


def _listed(pages: Pages, places: list[str]) -> str:
    return "\n".join(f"* {link(prose(title(pages.texts[place])), place)}" for place in places)
