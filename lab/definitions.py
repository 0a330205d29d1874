"""Definitions in YAML files: of a folder of conf, of the user's own, and of the packages that plug-ins offer."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table
from rich.text import Text

from blockwright.registry import ConfigError, did_you_mean, plugins, user_conf
from blockwright.registry.limits import read_text


@dataclass(frozen=True)
class Files:
    """The definitions of one kind.

    Args:
        kind: what a file defines, such as an ablation
        folder: of conf
        entry_points: group of packages with further files
        keys: of a file
        argument: of the command line that names a definition
    """

    kind: str
    folder: Path
    entry_points: str
    keys: tuple[str, ...]
    argument: str = "NAME"

    def names(self) -> list[str]:
        """Names of all definitions."""
        return sorted(self.known())

    def known(self) -> dict[str, list[Path]]:
        """Name of a definition → the files of this name, here, with the user and in other packages."""
        files: dict[str, list[Path]] = {}
        own = (each / self.folder.name for each in user_conf.folders())
        for folder in (self.folder, *own, *plugins.folders(self.entry_points)):
            for file in folder.glob("*.yaml"):
                files.setdefault(file.stem, []).append(file)
        return files

    def about(self, name: str) -> str:
        """What a definition is for, in one line."""
        return str(self.read(name).get("about", ""))

    def table(self, command: str) -> Table:
        """All definitions, as a command without arguments lists them."""
        table = Table(box=box.SIMPLE_HEAD, highlight=False)
        table.add_column(command, no_wrap=True)
        table.add_column("what it compares")
        for name in self.names():
            table.add_row(Text(name), Text(self.about(name)))
        return table

    def read(self, name: str) -> dict[str, Any]:
        """The contents of a file.

        Args:
            name: of a definition, or a path

        Raises:
            ConfigError: it does not exist, or is not a mapping in YAML
        """
        file = self._file(name)
        try:
            text = read_text(file, self.argument)
            if not isinstance(plain := yaml.safe_load(text) or {}, dict):
                raise ConfigError(str(file), plain, "must be a mapping", f"Its keys are: {', '.join(self.keys)}")
            written = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", error))
            where = f"{file}:{mark.line + 1}" if mark else str(file)
            twice = "two arms cannot have one name" if "duplicate" in problem else "fix that line"
            remedy = f"Quote what holds braces or colons; {twice}"
            raise ConfigError(where, "…", f"is not YAML ({problem})", remedy) from None
        except OmegaConfBaseException as error:
            raise ConfigError(str(file), "…", str(error).splitlines()[0], "Correct the file") from None
        assert isinstance(written, dict)
        return {str(key): value for key, value in written.items()}

    def _file(self, name: str) -> Path:
        if name.endswith((".yaml", ".yml")):
            file = Path(name)
        else:
            found = self.known().get(name, [self.folder / f"{name}.yaml"])
            if len(found) > 1:
                files = " and ".join(map(str, found))
                raise ConfigError(
                    self.argument, name, f"several {self.kind}s have this name: {files}", "Name one by its path"
                )
            file = found[0]
        if not file.is_file():
            what = "file" if file == Path(name) else self.kind
            remedy = f"{did_you_mean(name, self.names())}. One of yours is conf/{self.folder.name}/NAME.yaml, or a path"
            raise ConfigError(self.argument, name, f"there is no such {what}", remedy)
        return file


def refuse_overrides(overrides: Iterable[str], kind: str, name: str, keys: Container[str]) -> None:
    """Refuse overrides of what a definition says, or of what its jobs are given.

    Args:
        overrides: for all arms, from the command line
        kind: of the definition, in a word
        name: of the definition, or its path
        keys: of its file

    Raises:
        ConfigError: for the first of them
    """
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if "/" not in key and key.partition(".")[0] in keys:
            remedy = f"Copy {name.removesuffix('.yaml')}.yaml"
            raise ConfigError(key, value, f"can only be changed in the file of the {kind}", remedy)
        if key in ("seed", "hparams_search") or key.startswith(("hydra.", "hydra/")):
            remedy = "Write seeds=[7] for a seed of your own" if key == "seed" else "Leave it out"
            if key in ("hydra.run.dir", "hydra.sweep.dir"):
                remedy = "Choose the folder of all logs instead: paths.log_dir=DIR"
            raise ConfigError(key, value, f"is set by the {kind} for each job", remedy)
