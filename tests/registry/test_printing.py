"""What commands print where: framed on a terminal, complete lines in a pipe."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from blockwright import registry
from blockwright.registry import printing

ROOT = Path(registry.__file__).parent.parent
LONG = "word " * 60 + "end"


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def a_table() -> Table:
    table = Table(title=Text("[of three]"), caption="[bold]two[/] rows")
    table.add_column("name", no_wrap=True)
    table.add_column("parameters\nin all", justify="right")
    table.add_column("what")
    table.add_row("attention/a_name_that_no_screen_cuts", "7", LONG)
    table.add_row("[bold]b[/]", "1,234", Text("[red]\n  more"))
    return table


@pytest.mark.parametrize("columns", ["10", "80", "400"])
def test_piped_table_has_a_complete_line_for_each_row(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as services that run tests set it
    file = StringIO()
    printing.show(a_table(), file)
    title, header, first, second, caption = file.getvalue().splitlines()
    assert (title, caption) == ("[of three]", "two rows")
    assert re.split(r"  +", header) == ["name", "parameters in all", "what"]
    assert re.split(r"  +", first) == ["attention/a_name_that_no_screen_cuts", "7", LONG]
    assert re.split(r"  +", second) == ["b", "1,234", "[red] more"]
    assert first.index("7") == second.index("4")  # numbers end in the same column


def test_terminal_gets_a_frame_of_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "70", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    file = Terminal()
    printing.show(a_table(), file)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # bold and colour
    assert max(map(len, shown.splitlines())) <= 70 and "│" in shown
    assert "attention/a_name_that_no_screen_cuts" in shown


def test_text_and_lines_are_as_long_as_they_are_in_a_pipe() -> None:
    file = StringIO()
    printing.show_text("[b]", "a title", file)
    printing.console(file).print(LONG)
    assert file.getvalue() == f"a title:\n[b]\n{LONG}\n"


def test_table_without_rows_or_title_prints_its_header() -> None:
    assert list(printing.lines(Table("a", "b"))) == ["a  b"]
    assert list(printing.lines(Table("", ""))) == []


@pytest.mark.parametrize(
    ("module", "arguments", "word"),
    [
        ("blockwright.registry.__main__", ["attention"], "attention/sliding_window"),
        ("blockwright.registry.__main__", ["position/yarn"], "original_positions"),
        ("blockwright.lab.match.__main__", ["model=tiny", "model/attention=mha,sliding_window"], "sliding_window"),
    ],
)
def test_every_command_prints_whole_names_whatever_the_columns(
    module: str,
    arguments: Sequence[str],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert not importlib.import_module(module).main(arguments)
    printed = capsys.readouterr().out
    assert not re.search(r"\w…", printed) and "│" not in printed
    assert word in printed


def test_no_command_prints_tables_in_a_way_of_its_own() -> None:
    packages = ("registry", "blocks", "training", "lab", "plugins")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py") if "tests" not in file.parts]
    own = [f.relative_to(ROOT).as_posix() for f in files if "import Console" in f.read_text()]
    assert sorted(own) == ["lab/sweep/progress.py", "registry/printing.py"]  # the first, for its live display


def test_stream_whose_reader_has_gone_is_written_to_without_an_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(writing, "w", buffering=1) as pipe:
        stream = printing.Outlived(pipe)
        print("seen", file=stream)  # type: ignore[call-overload]
        assert os.read(reading, 9) == b"seen\n" and not stream.isatty()
        os.close(reading)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)  # type: ignore[call-overload]


def test_stream_that_was_closed_before_the_start_takes_what_is_written() -> None:
    stream = printing.Outlived(None)
    assert stream.write("lost in the pipe!") == 17
    stream.flush()
    stream.stream.close()
