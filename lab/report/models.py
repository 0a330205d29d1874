"""The models of a report's arms, drawn: the baseline's, and each other one with what differs from it marked.

A composition is read from the checkpoint of a run, as data. An arm whose runs have none that this version can build has
no picture; nor has one whose model is the baseline's, such as an arm of another learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from blockwright.lab.report.findings import Finding, Findings
from blockwright.registry import ConfigError
from blockwright.registry.folder import place

if TYPE_CHECKING:
    from blockwright.lab.difference.difference import Side

CHECKPOINT = "checkpoints/last.ckpt"
LAB = Path(__file__).resolve().parent.parent
CSS = tuple(LAB / name / "picture.css" for name in ("drawing", "difference"))
MANY = 12  # pictures of a page
NAMED = 6  # settings that a caption names


@dataclass(frozen=True)
class Drawn:
    """A picture that a page has folded.

    Args:
        heading, caption: of it
        file: its name in the report's folder
        inline: SVG for a page with the style sheets ``CSS``
        alone: SVG for the file
    """

    heading: str
    caption: str
    file: str
    inline: str
    alone: str


def models(findings: Findings) -> list[Drawn]:
    """The pictures of the arms' models; none without a model of the baseline."""
    baseline = _side(findings.baseline)
    others = [(i, side) for i, arm in enumerate(findings.arms) if not arm.is_baseline and (side := _side(arm))]
    if baseline is None:
        return []
    return [_whole(baseline), *(each for i, side in others[: MANY - 1] if (each := _against(baseline, side, i)))]


def _side(arm: Finding) -> Side | None:
    """The model of an arm, from the first of its runs that has one."""
    from blockwright.lab.difference.difference import Side
    from blockwright.lab.difference.settings import read
    from blockwright.training.checkpoints.record import peek

    for run in arm.runs:
        try:
            past = peek(place(run.folder, CHECKPOINT)) if run.folder is not None else None
            if past is not None and "model" in past.settings:
                return Side(arm.name, read(past.settings["model"]))
        except ConfigError:  # a damaged or an untrusted one, or of a package that is not installed
            continue
    return None


def _whole(side: Side) -> Drawn:
    from blockwright.lab.drawing.picture import picture
    from blockwright.lab.drawing.scheme import scheme

    svg = picture(scheme(side.model.decoder, side.name))
    return Drawn(f"{side.name}, the baseline", "", "model-baseline.svg", _inline(ET.fromstring(svg), "baseline"), svg)


def _against(baseline: Side, side: Side, number: int) -> Drawn | None:
    """The picture of an arm's model; None if it is the baseline's."""
    from blockwright.lab.difference import views
    from blockwright.lab.difference.difference import difference
    from blockwright.lab.difference.views import LEGEND, drawn, side_by_side

    found = difference(baseline, side)
    settings = [f"{label} {a} → {b}" for sign, label, a, b, _ in views.differing(found) if sign == views.DIFFERS]
    if not settings:
        return None
    more = f"; and {len(settings) - NAMED} more" if len(settings) > NAMED else ""
    caption = f"{LEGEND}. {'; '.join(dict.fromkeys(settings[:NAMED]))}{more}."
    inline = _inline(drawn(found, side, "b"), str(number))
    return Drawn(f"{side.name}, against {baseline.name}", caption, f"model-{number}.svg", inline, side_by_side(found))


def _inline(root: ET.Element, name: str) -> str:
    """A picture for a page: without styles, and with a pattern of its own, since that of a folded one is not drawn."""
    for style in root.findall("{*}style"):
        root.remove(style)
    for pattern in root.iter():
        if pattern.get("id") == "bw-hatch":
            pattern.set("id", f"bw-hatch-{name}")
        if "hatch" in (pattern.get("class") or "").split():
            pattern.set("style", f"fill: url(#bw-hatch-{name})")
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return ET.tostring(root, encoding="unicode")
