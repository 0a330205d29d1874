"""The skills of a run, from the settings in its folder, which may be untrusted: registered names build everything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright import registry
from blockwright.plugins.skills.skill.base import MARKS, Skill
from blockwright.registry import ConfigError, Node, Scope
from blockwright.registry.folder import read_yaml
from blockwright.registry.references import References

SETTINGS = ".hydra/config.yaml"
REMEDY = "Name the folder of a run with data=skills"


def skills_of(run: Path) -> list[Skill]:
    """The skills that a run was trained on, in the order of their marks.

    Raises:
        ConfigError: the folder has no settings, its data are no skills, or a skill is none that can be built
    """
    return [_built(node, f"data.skill.{place}") for place, node in enumerate(_nodes(run))]


def check_difficulty(run: Path, place: int, difficulty: int) -> None:
    """Refuse a difficulty that one skill of a run cannot have, by the bounds of its schema.

    Args:
        run: its folder
        place: of the skill in the run's list
        difficulty: to measure

    Raises:
        ConfigError: at ``--difficulty``
    """
    node = _nodes(run)[place]
    written = {"name": node} if isinstance(node, str) else node
    try:
        _built({**written, "difficulty": difficulty}, "skill")
    except ConfigError as error:
        raise ConfigError("--difficulty", difficulty, error.rule, error.remedy) from None


def _nodes(run: Path) -> list[Any]:
    """The nodes of the skills in the settings of a run."""
    if not (run / SETTINGS).is_file():
        raise ConfigError("RUN", str(run), f"holds no {SETTINGS}, which names its skills", REMEDY)
    settings = read_yaml(run, SETTINGS)
    data = settings.get("data") if isinstance(settings, Mapping) else None
    name = data.get("name") if isinstance(data, Mapping) else None
    if not isinstance(settings, Mapping) or not isinstance(data, Mapping) or name != "skills":
        raise ConfigError("data.name", name, "is no data of skills", REMEDY)
    found = References(dict(settings), str(run / SETTINGS), REMEDY).resolve({"skill": data.get("skill")})["skill"]
    nodes = found if isinstance(found, list) else [found]
    if not 1 <= len(nodes) <= len(MARKS):
        raise ConfigError("data.skill", nodes, f"must be 1 to {len(MARKS)} skills", REMEDY)
    return nodes


def _built(node: Any, path: str) -> Skill:
    registry.refuse_targets(node, path)
    built: Skill = registry.build("skill", Node(node, path), Scope({}, {}))
    return built
