"""``blockwright again RUN [OVERRIDE …] [--without KEY] [--plan-only]``: train a run once more, with a change.

RUN is the folder of a run, or of a job of a sweep. Its overrides and yours compose a run in a new folder, which starts
from the beginning; yours replaces the one of RUN that has the same key, and --without KEY leaves one out. What differs
is shown before it starts.

What would differ without your asking is refused, with the words that settle it: a default or an experiment's file that
has changed since, and a text that is not RUN's. So its batches are those of RUN in the same order, unless you change
``data`` or ``seed``.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from blockwright.registry import ConfigError, did_you_mean, user_conf
from blockwright.registry.command import Parser, read_words, run_command
from blockwright.registry.folder import read_yaml
from blockwright.registry.printing import show
from blockwright.training.jobs import MODULE, SWEEP

if TYPE_CHECKING:
    from blockwright.lab.difference.settings import Entry

STARTS = ("ckpt_path", "auto_resume", "resume")  # a run again starts from its beginning
ELSEWHERE = ("hydra", "paths", *STARTS)  # says where a run is, and nothing of what it computes
OF_BATCHES = ("data", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(prog="blockwright again", description=__doc__)
    parser.add_argument("--without", metavar="KEY", action="append", default=[], help="leave out an override of RUN")
    parser.add_argument("--plan-only", action="store_true", help="show what differs, and train nothing")
    flags, words = read_words(parser, arguments, (), n_names=1)
    if not words.names:
        raise ConfigError("RUN", None, "must name the folder of a run", "Write blockwright again logs/train/runs/TIME")
    folder = Path(words.names[0])
    theirs = _overrides(folder)
    asked = [*map(_key, words.overrides), *flags.without]
    overrides = [*_kept(theirs, asked, flags.without), *words.overrides]
    differing = _differing(folder, theirs, overrides, asked)
    _show(folder, differing)
    if not any(_is_below(entry.path, OF_BATCHES) for entry in differing):
        is_known = _refuse_another_text(folder, overrides)
        print("Batches: those of RUN, in the same order" + ("" if is_known else ", if the text has not changed"))
    print(shlex.join(["blockwright", "train", *user_conf.flags(), *overrides]), flush=True)
    if not flags.plan_only:
        importlib.import_module(MODULE).main(overrides)  # the program, which is above this folder


# --- what RUN was given, and what that makes today --------------------------------------------------------------------


def _overrides(folder: Path) -> list[str]:
    """The overrides that a run was given, without those that say where it starts.

    Raises:
        ConfigError: it is no run of Hydra's
    """
    if (folder / SWEEP).is_file():
        raise ConfigError("RUN", str(folder), "is a sweep", f"Name one of its jobs: {folder / '0'}")
    if not (folder / ".hydra" / "overrides.yaml").is_file():
        remedy = (
            "Name a folder that `blockwright train` has made; of Lightning CLI: train fit --config lightning_cli.yaml"
        )
        raise ConfigError("RUN", str(folder), "has no record of its overrides, .hydra/overrides.yaml", remedy)
    found = read_yaml(folder / ".hydra", "overrides.yaml")
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ConfigError(str(folder / ".hydra" / "overrides.yaml"), "…", "must list overrides", "Name another run")
    return [each for each in found if _key(each).partition(".")[0] not in STARTS]


def _key(override: str) -> str:
    """``+model.attention.window=8`` → ``model.attention.window``."""
    return override.partition("=")[0].lstrip("+~")


def _kept(theirs: Sequence[str], asked: Sequence[str], without: Sequence[str]) -> list[str]:
    for key in without:
        if key not in (keys := [*map(_key, theirs)]):
            raise ConfigError("--without", key, "is no override of RUN", did_you_mean(key, keys, "It has none"))
    return [each for each in theirs if _key(each) not in asked]


def _differing(folder: Path, theirs: list[str], overrides: list[str], asked: Sequence[str]) -> list[Entry]:
    """The settings in which the run again differs from RUN.

    Raises:
        ConfigError: one of them was not asked for, or nothing can be composed
    """
    from blockwright.lab.difference.settings import compared  # torch and Hydra, which --help does without
    from blockwright.training.checkpoints.record import is_left_out

    _refuse_missing_folders(folder)
    then, today = _flat(read_yaml(folder / ".hydra", "config.yaml")), _flat(_composed(theirs))
    settled = [key.replace("/", ".") for key in asked]
    drifted = [
        entry
        for entry in compared(then, today)
        if not (entry.same or is_left_out(entry.path) or _is_below(entry.path, settled))
    ]
    if drifted:
        first, more = drifted[0], ", ".join(entry.path for entry in drifted[1:9])
        rule = f"was {first.a!r} in RUN, and the same overrides make {first.b!r} today"
        rule += f"; likewise {more}" if more else ""
        remedy = f"Say which it is: {first.path}=VALUE (with + where RUN alone has it, or ~{first.path} for none)"
        raise ConfigError(first.path, first.b, rule, remedy)
    return [entry for entry in compared(then, _flat(_composed(overrides))) if not entry.same]


def _refuse_missing_folders(folder: Path) -> None:
    """Refuse to compose without a folder of the user's that RUN was composed with."""
    try:
        sources = read_yaml(folder / ".hydra", "hydra.yaml")["hydra"]["runtime"]["config_sources"]
        named = [Path(each["path"]) for each in sources if each["provider"] == user_conf.PROVIDER]
    except (ConfigError, KeyError, TypeError):  # without it, composing says what is missing
        return
    for path in named:
        if path not in user_conf.folders():
            rule = "has options that RUN was composed with, and is not searched now"
            raise ConfigError("--config-dir", str(path), rule, f"Add --config-dir {path}, or where it is now")


def _composed(overrides: list[str]) -> Any:
    from omegaconf import OmegaConf

    from blockwright.training.configuration.composing import compose_config

    return OmegaConf.to_container(compose_config(overrides), resolve=False, enum_to_str=True)


def _flat(settings: Any) -> dict[str, Any]:
    from blockwright.lab.difference.settings import flat

    if not isinstance(settings, dict):
        raise ConfigError("RUN", settings, "has a configuration that is no mapping", "Name another run")
    return flat({key: value for key, value in settings.items() if key not in ELSEWHERE})


def _is_below(path: str, keys: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{key}.") for key in keys)


def _show(folder: Path, differing: Sequence[Entry]) -> None:
    if not differing:
        print("Nothing differs from RUN")
        return
    table = Table("setting", str(folder.name), "again")
    for entry in differing:
        table.add_row(entry.path, str(entry.a), str(entry.b))
    show(table)


# --- the text ---------------------------------------------------------------------------------------------------------


def _refuse_another_text(folder: Path, overrides: Sequence[str]) -> bool:
    """Refuse a corpus that is not the one whose fingerprint a checkpoint of RUN has; false if it has left none.

    Raises:
        ConfigError: at ``data``
    """
    from blockwright.blocks.checkpoint.read import read_checkpoint
    from blockwright.training.checkpoints.find import first_good, inside
    from blockwright.training.configuration import parts, placeholders
    from blockwright.training.configuration.composing import compose_config
    from blockwright.training.data.modules.batches import RowDataModule
    from blockwright.training.entry.parse import parse_settings

    if (file := first_good(inside(folder / "checkpoints"))) is None:
        return False
    found = read_checkpoint(file, shapes_only=True)
    states = (each for each in found.values() if isinstance(each, dict) and {"tokenizer", "batches"} <= each.keys())
    data = parts.build("data", parse_settings(compose_config(overrides, output_dir=placeholders.ANY)))
    if (state := next(states, None)) is None or not isinstance(data, RowDataModule):
        return False
    data.prepare_data()
    data.setup("fit")
    if changed := data.changes(state):
        rule = f"makes other batches than in RUN: {'; '.join(changed)}"
        raise ConfigError("data", str(file), rule, "Restore the text; or train it as another run: blockwright train")
    return True


if __name__ == "__main__":
    sys.exit(main())
