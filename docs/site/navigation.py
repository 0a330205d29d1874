"""The configuration of zensical: the navigation, and the few features of its theme."""

from __future__ import annotations

import json
import re
from pathlib import Path

from docs.site.markdown import Pages, links

Entry = str | dict[str, "Entry | list[Entry]"]  # a page with its own title, or a title → a page or a section
EXPLANATIONS = ("explanation", "registry", "blocks", "training", "lab", "security")
HOW_TO = "how-to/index.md"  # its headings and links are the how-to section of the navigation
SETTINGS = """\
[project]
site_name = "Blockwright"
site_description = "Compose a decoder from named blocks, train it, swap one block by name, compare fairly."
docs_dir = "pages"
site_dir = "site"
nav = {nav}

[project.theme]
language = "en"
font = false
features = ["navigation.indexes", "navigation.prune", "navigation.tabs", "navigation.top", "navigation.path"]

# No switch: pictures follow the system's choice of light or dark, as do these.
[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"

[project.markdown_extensions]
tables = {{}}
toc.permalink = true
"pymdownx.highlight" = {{}}
"pymdownx.superfences" = {{}}

[project.plugins.search]

[project.plugins.mkdocstrings.handlers.python]
paths = [{source}]

[project.plugins.mkdocstrings.handlers.python.options]
docstring_style = "google"
heading_level = 2
show_root_heading = true
show_source = false
separate_signature = true
show_signature_annotations = true
signature_crossrefs = false
docstring_options = {{ warn_unknown_params = false, warn_missing_types = false }}
"""


def configuration(pages: Pages, source: Path) -> str:
    """The text of zensical.toml.

    Args:
        pages: all of them
        source: the folder that holds the package
    """
    return SETTINGS.format(nav=_toml(_navigation(pages)), source=json.dumps(str(source)))


def _navigation(pages: Pages) -> list[Entry]:
    blocks: list[Entry] = [_index("reference/blocks")]
    kinds = sorted({place.split("/")[2] for place in pages.texts if re.match(r"reference/blocks/\w+/", place)})
    blocks += [{kind: _folder(pages, f"reference/blocks/{kind}")} for kind in kinds]
    reference: list[Entry] = [
        _index("reference"),
        {"Blocks": blocks},
        {"Catalogue": "reference/catalogue.md"},
        {"Presets": _folder(pages, "reference/presets")},
        {"Options": _folder(pages, "reference/options")},
        {"Commands": _folder(pages, "reference/commands")},
        {"Ablations and ladders": _folder(pages, "reference/comparisons")},
        {"Public interface": _folder(pages, "reference/interface")},
        {"Examples of command lines": "reference/examples.md"},
        {"Refusals": "reference/refusals.md"},
        {"Papers": "reference/papers.md"},
        {"Plug-ins": "reference/plug-ins.md"},
    ]
    return [
        {"Home": "index.md"},
        {"Tutorial": "tutorial.md"},
        {"How-to guides": [HOW_TO, *_how_to(pages.texts[HOW_TO])]},
        {"Reference": reference},
        {"Explanation": [f"explanation/{name}.md" for name in EXPLANATIONS]},
        {"Results": _folder(pages, "results")},
        {"Project": ["project/contributing.md", "project/changes.md"]},
    ]


def _how_to(page: str) -> list[Entry]:
    """Heading → the pages that are linked below it."""
    parts = re.split(r"^## (.+)$", page, flags=re.M)[1:]
    return [
        {heading: [target.removeprefix("/") for target in links(below)]}
        for heading, below in zip(parts[::2], parts[1::2], strict=True)
    ]


def _index(folder: str) -> str:
    return f"{folder}/index.md"


def _folder(pages: Pages, folder: str) -> list[Entry]:
    """The index of a folder, if it has one, then its other pages."""
    places = sorted(place for place in pages.texts if place.startswith(f"{folder}/"))
    return sorted(places, key=lambda place: place != _index(folder))


def _toml(value: Entry | list[Entry]) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)
