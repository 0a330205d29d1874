"""``blockwright skills RUN [--skill NAME] [--difficulty N,M] [--json]``: the skills of a trained run by difficulty.

A run of data=skills has the skills that it was trained on, one or several. Each is measured on fresh rows, the same for
every model: the share of right answers with its interval, chance, the floor of guessing from the row, and the
bytes of state that the model had for them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from blockwright import registry
from blockwright.blocks.checkpoint.source import DTYPES, Source, build, open_source, usable_device, usable_dtype
from blockwright.blocks.kernels.machine import keep_freed_memory
from blockwright.lab.report.svg import standalone
from blockwright.lab.writer import tokenizer_of
from blockwright.plugins.skills.measure import Measured, measure, write
from blockwright.plugins.skills.report import by_difficulty
from blockwright.plugins.skills.rows import ids_of
from blockwright.plugins.skills.skill.base import MARKS, SYMBOLS, Skill, name_of
from blockwright.registry import ConfigError, Node, Scope, did_you_mean
from blockwright.registry.command import Parser, run_command, strict_json
from blockwright.registry.folder import References, own_folder, read_yaml, write_text
from blockwright.registry.printing import show
from blockwright.training.data.tokenizers.tokenizer import Tokenizer

# --- the skills of a run ----------------------------------------------------------------------------------------------


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


MOST_ROWS, MOST_DIFFICULTIES = 100_000, 20


def _parser() -> Parser:
    parser = Parser(prog="blockwright skills", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="the folder of a run with data=skills")
    parser.add_argument("--skill", metavar="NAME", help="measure this one alone")
    parser.add_argument("--difficulty", metavar="N,M", help="of the rows; default: those of training. With one skill")
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="rows of each difficulty; default 256")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES))
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, …")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for skills.json and skills.svg; default: RUN/skills"
    )
    parser.add_argument("--json", action="store_true", help="print plain numbers")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line, the run or its skills
    """
    words = _parser().parse_args(arguments)
    if not 1 <= words.samples <= MOST_ROWS:
        raise ConfigError("--samples", words.samples, f"must be 1 to {MOST_ROWS:,} rows", "Leave it out")
    if words.out is not None and words.out.exists() and not words.out.is_dir():
        raise ConfigError("--out", str(words.out), "is a file, and a folder is written", "Name a folder")
    dtype, folder = usable_dtype(words.dtype), Path(words.run)
    source = open_source(folder, "RUN")
    wanted = _wanted(skills_of(folder), words.skill)
    difficulties = _difficulties(folder, wanted, words.difficulty)
    for skill in wanted.values():
        _check_room(source, skill, difficulties or skill.levels)
    ids = _ids(tokenizer_of(source, folder))
    out = words.out or own_folder(folder, "skills")
    keep_freed_memory()
    decoder = build(source, dtype=dtype, device=usable_device(words.device))
    tell = (lambda line: None) if words.json else (lambda line: print(line, flush=True))
    found = [measure(decoder, skill, place, ids, words.samples, difficulties, tell) for place, skill in wanted.items()]
    files = [write(out, found), out / "skills.svg"]
    write_text(files[1], standalone(by_difficulty(found)))
    if words.json:
        print(strict_json({"run": words.run, "skills": [each.to_plain() for each in found]}))
        return
    for each in found:
        show(table(each))
    print(f"{out}: {', '.join(file.name for file in files)}")


def _wanted(skills: Sequence[Skill], name: str | None) -> dict[int, Skill]:
    """Place in the run's list → skill, of those that are measured."""
    known = {name_of(skill): place for place, skill in enumerate(skills)}
    if name is None:
        return dict(enumerate(skills))
    if name not in known:
        raise ConfigError("--skill", name, "is no skill of this run", did_you_mean(name, known))
    return {known[name]: skills[known[name]]}


def _difficulties(folder: Path, wanted: dict[int, Skill], text: str | None) -> list[int] | None:
    """The difficulties of the option, each within the bounds of the one skill; None for those of training."""
    if text is None:
        return None
    if len(wanted) > 1:
        rule = f"counts something else for each of {len(wanted)} skills"
        raise ConfigError("--difficulty", text, rule, "Add --skill NAME")
    parts = text.split(",")
    if len(parts) > MOST_DIFFICULTIES or not all(part.isdecimal() and len(part) < 8 for part in parts):
        rule = f"must be up to {MOST_DIFFICULTIES} whole numbers with commas"
        raise ConfigError("--difficulty", text, rule, "Write e.g. --difficulty 4,8,16")
    found = sorted({int(part) for part in parts})
    ((place, skill),) = wanted.items()
    for difficulty in found:
        check_difficulty(folder, place, difficulty)
        if difficulty < skill.least:
            rule = f"is below the easiest question of this skill: {skill.least} {skill.unit}"
            raise ConfigError("--difficulty", difficulty, rule, f"Write {skill.least} or more")
    return found


def _check_room(source: Source, skill: Skill, difficulties: Sequence[int]) -> None:
    room, needed = int(source.model["max_positions"]), max(map(skill.length, difficulties))
    if needed > room:
        rule = f"asks {name_of(skill)} in rows of {needed} tokens, and the model has positions for {room}"
        raise ConfigError("--difficulty", max(difficulties), rule, "Write a lower one")
    if int(source.model["vocab_size"]) < SYMBOLS:
        rule = f"has fewer tokens than skills have symbols ({SYMBOLS})"
        raise ConfigError("RUN", source.model["vocab_size"], rule, REMEDY)


def _ids(tokenizer: Tokenizer) -> Any:
    ids = ids_of(tokenizer)
    if len(ids) != SYMBOLS:
        rule = f"makes {len(ids)} tokens of the {SYMBOLS} symbols of skills, and each must be one"
        raise ConfigError("RUN", tokenizer.kind, rule, REMEDY)
    return ids


def table(found: Measured) -> Table:
    """A row per difficulty."""
    made = Table(
        title=f"{found.skill}, trained to {found.trained:,} {found.unit}", title_justify="left", box=box.SIMPLE_HEAD
    )
    knows = any(level.bits is not None for level in found.levels)
    heads = (found.unit, "right", "95 % interval", "rows solved", "chance", "floor", "tokens", "state bytes")
    for head in (*heads, *(("bits held", "of") if knows else ())):
        made.add_column(head, justify="right")
    for level in found.levels:
        low, high = level.interval
        state = "–" if level.state_bytes is None else f"{level.state_bytes:,}"
        cells = [f"{level.difficulty:,}", f"{level.accuracy:.3f}", f"{low:.3f} to {high:.3f}"]
        cells += [f"{level.solved / level.rows:.3f}", f"{level.chance:.3f}", f"{level.floor:.3f}"]
        cells += [f"{level.length:,}", state]
        held = level.learned_bits()
        made.add_row(*cells, *((f"{held:,.0f}", f"{level.bits:,.0f}") if held is not None and level.bits else ()))
    return made


if __name__ == "__main__":
    sys.exit(run_command(main))
