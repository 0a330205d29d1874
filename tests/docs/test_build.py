"""The built site: without warnings, with every name in pages, search and inventory, links and anchors that lead on."""

from __future__ import annotations

import json
import posixpath
import re
import zlib
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

from blockwright import registry
from blockwright.commands import commands
from blockwright.lazy import read_stub
from blockwright.registry import ConfigError, catalogue, presets
from blockwright.registry.errors import has_package
from docs.site import __main__ as site
from docs.site.sources import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("site"),
    pytest.mark.skipif(not has_package("zensical"), reason="needs the extra site"),
]
NAMES = read_stub(ROOT / "src" / "blockwright" / "__init__.pyi")
BLOCKS = [f"{kind}/{name}" for kind in registry.kinds(None) for name in registry.names(kind)]


class Built(NamedTuple):
    """The site, and what its builder printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("site")
    printed = site.build(site.write(site.collect(presets.names(), catalogue.families()), folder))
    return Built(folder / "site", printed)


@dataclass
class Page(HTMLParser):
    """What a page links to and loads, and its anchors."""

    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.anchors |= {found[key] for key in ("id", "name") if key in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag in ("script", "img") and "src" in found:
            self.loaded.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def html(built: Built) -> dict[str, Page]:
    """Place of every page → what is in it."""
    read = {}
    for file in built.folder.rglob("*.html"):
        page = Page()
        page.feed(file.read_text())
        read[file.relative_to(built.folder).as_posix()] = page
    return read


def test_it_is_built_without_a_warning(built: Built) -> None:
    assert "No issues found" in built.printed and not re.search("warning|error|griffe", built.printed, re.IGNORECASE)


def test_every_name_has_a_page_and_is_in_the_search_and_the_inventory(built: Built) -> None:
    places = [f"blocks/{block}" for block in BLOCKS] + [f"presets/{name}" for name in presets.names()]
    places += [f"commands/{name}" for name in commands()] + [f"interface/{name}" for name in NAMES]
    assert len(places) > 300
    assert not [place for place in places if not (built.folder / "reference" / place / "index.html").is_file()]
    items = json.loads((built.folder / "search.json").read_text())["items"]
    titles = {re.sub("<.+?>", "", item["title"]) for item in items}
    assert {*BLOCKS, *presets.names(), *NAMES, *(f"blockwright {name}" for name in commands())} <= titles
    compressed = (built.folder / "objects.inv").read_bytes().partition(b"using zlib.\n")[2]
    objects = {line.partition(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}
    assert {f"blockwright.{name}" for name in NAMES} <= objects


def test_links_lead_to_pages_and_anchors(html: dict[str, Page], built: Built) -> None:
    for place, page in html.items():
        broken = [href for href in page.links if not _leads(place, href, html, built)]
        assert not broken, place


def _leads(place: str, href: str, html: dict[str, Page], built: Built) -> bool:
    address = urlsplit(href)
    if address.scheme or address.netloc or place == "404.html":
        return True
    path = _target(place, address.path)
    anchor = unquote(address.fragment)
    if path in html:
        return not anchor or anchor in html[path].anchors
    return (built.folder / path).is_file()


def _target(place: str, path: str) -> str:
    """The file that a path on a page leads to."""
    if not path:
        return place
    folder = path.endswith("/") or posixpath.basename(path) in (".", "..")
    joined = posixpath.join(posixpath.dirname(place), unquote(path), "index.html" if folder else "")
    return posixpath.normpath(joined)


def test_pages_load_nothing_from_elsewhere(html: dict[str, Page], built: Built) -> None:
    for place, page in html.items():
        addresses = [urlsplit(source) for source in page.loaded]
        assert not [address for address in addresses if address.netloc], place
        if place != "404.html":  # it is shown under any path, so its paths begin at the root
            assert all((built.folder / _target(place, address.path)).is_file() for address in addresses), place


def test_link_that_leads_nowhere_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pages = site.Pages()
    for place in ("index.md", "how-to/index.md"):
        pages.add(place, "# Title\n\n[lost](/lost.md)")
    pages.add("results/index.md", "# Results")
    with pytest.raises(ConfigError, match="zensical"):
        site.build(site.write(pages, tmp_path))
    assert "page does not exist" in capfd.readouterr().out
