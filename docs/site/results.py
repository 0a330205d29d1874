"""The list of all measurements in the repository."""

from __future__ import annotations

from docs.site.markdown import Pages, link, prose, title

PLACE = "results/index.md"
COMPARISONS = ("results/ablations/", "results/ladders/")
HEAD = f"""\
# Results

Each page names the machine, the versions and the date, and shows ratios from one run with alternated repeats.
{link("Measure speeds", "how-to/benchmarks.md")} explains how they are measured and how to repeat them, and
{link("read the report", "how-to/report.md")} what the verdicts and intervals of an ablation mean.
"""


def add(pages: Pages) -> None:
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
