"""The command that an import prints is accepted as it stands, from folders of any name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from blockwright.plugins.hub.exporting import export_folder
from tests import test_printed_commands as commands
from tests.test_printed_commands import ODD

odd, printed, trains = commands.odd, commands.printed, commands.trains


def test_the_command_of_an_import(
    odd: Path, tmp_path: Path, printed: Callable[..., list[str]], trains: Callable[..., dict[str, Any]]
) -> None:
    export_folder(odd / "run", tmp_path / "hf" / ODD)
    out = tmp_path / ODD
    assert trains(printed("import", str(tmp_path / "hf" / ODD), str(out)))["init_from"] == str(out)
