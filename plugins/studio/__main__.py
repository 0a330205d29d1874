"""``blockwright studio [LOGS] [--port N] [--open]``: choose blocks on a local page, and watch runs.

It serves this machine alone, at an address that it prints once it listens. LOGS is the folder whose runs and sweeps it
shows; default: logs. Ctrl-C ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command
from blockwright.registry.errors import require

LOGS, PORT = "logs", 8008


def _parser() -> Parser:
    parser = Parser(prog="blockwright studio", description=__doc__)
    parser.add_argument("logs", metavar="LOGS", nargs="?", help=f"folder of runs and sweeps; default {LOGS}")
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"0 for any that is free; default {PORT}")
    parser.add_argument("--open", action="store_true", help="open the address in the browser")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        ConfigError: an error in the command line
    """
    options = _parser().parse_args(arguments)
    if not 0 <= options.port <= 65535:
        raise ConfigError("--port", options.port, "must be from 0 to 65535", f"Write e.g. --port {PORT}")
    require("studio", "starlette", "uvicorn", path="command line", value="studio")
    from blockwright.plugins.studio.serving import serve

    serve(_folder(options.logs), options.port, options.open)


def _folder(name: str | None) -> Path:
    """The log folder; the usual one may not exist yet.

    Raises:
        ConfigError: a folder that is named is none
    """
    folder = Path(name or LOGS)
    if name is not None and not folder.is_dir():
        raise ConfigError("LOGS", name, "is not a folder", "Name the folder that holds your runs, such as logs")
    return folder.absolute()


if __name__ == "__main__":
    sys.exit(run_command(main))
