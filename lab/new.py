"""``blockwright new PATH``: a repository of your own, with an attention and its test, an experiment and an ablation.

Its checks pass and it trains as it is; a batch script for a cluster and a file for continuous integration are in it
too. The folder's name is the package's, and nothing that exists is overwritten. Where this package is installed from no
index, name its wheel or address in the new pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.registry.folder import write_text

TEMPLATE = Path(__file__).parent / "template"
FILES = {  # file of the repository → of the template
    "pyproject.toml": "pyproject.toml.j2",
    "README.md": "README.md.j2",
    ".gitignore": "gitignore.j2",
    "PACKAGE/__init__.py": "init.py.j2",
    "PACKAGE/tied.py": "tied.py.j2",
    "tests/test_tied.py": "test_tied.py.j2",
    "conf/preset/small.yaml": "preset.yaml.j2",
    "conf/experiment/first.yaml": "experiment.yaml.j2",
    "conf/ablation/first.yaml": "ablation.yaml.j2",
    "cluster.sh": "cluster.sh.j2",
    ".github/workflows/checks.yml": "checks.yml.j2",
}
PACKAGE = "PACKAGE"  # stands for its name, in paths and in texts
TAKEN = ("tests", "conf", "logs", "data")  # folders of the repository


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. A refusal prints one message and returns 64."""
    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> None:
    parser = Parser(prog="blockwright new", description=__doc__)
    parser.add_argument("PATH", type=Path)
    path = parser.parse_args(arguments).PATH
    package = _package(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError("PATH", str(path), "exists already", "Name a folder that does not, or an empty one")
    for name, file in FILES.items():
        where = path / name.replace(PACKAGE, package)
        where.parent.mkdir(parents=True, exist_ok=True)
        write_text(where, (TEMPLATE / file).read_text().replace(PACKAGE, package))
        print(where)
    print(f"\ncd {path} && pip install -e '.[test]' && pytest\nREADME.md says how it is trained, swept and compared")


def _package(path: Path) -> str:
    """The name of the package, from that of the folder.

    Raises:
        ConfigError: it would be no name, or one that another module has
    """
    name = re.sub(r"\W+|-", "_", path.resolve().name.lower(), flags=re.ASCII).strip("_")
    if not name.isidentifier() or keyword.iskeyword(name) or name in TAKEN:
        raise ConfigError("PATH", str(path), f"gives a package the name {name!r}, which it cannot have", "Name another")
    if importlib.util.find_spec(name) is not None:
        rule = f"gives a package the name {name!r}, which an installed module has"
        raise ConfigError("PATH", str(path), rule, "Name another")
    return name


if __name__ == "__main__":
    sys.exit(main())
