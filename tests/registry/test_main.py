"""``python -m blockwright.registry``, and how commands print: framed on a terminal, complete lines in a pipe."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from blockwright import registry
from blockwright.blocks.norm import Norm
from blockwright.registry import ConfigError, printing, register
from blockwright.registry.__main__ import main
from blockwright.registry.command import run_command

ROOT = Path(registry.__file__).parent.parent
EVERY = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "250")

    def run(*arguments: str) -> str:
        main(list(arguments))
        return capsys.readouterr().out

    return run


def test_everything_is_listed_with_its_summary_and_a_kind_alone(show: Callable[..., str]) -> None:
    printed = show()
    for kind, name in EVERY:
        assert f"{kind}/{name}" in printed and registry.lookup(kind, name).schema.summary[:40] in printed
    for kind in ("attention", "norm/"):
        printed = show(kind)
        assert {(k, n) for k, n in EVERY if f"{k}/{n}" in printed} == {e for e in EVERY if e[0] == kind.strip("/")}
        assert max(map(len, printed.splitlines())) < 300


# One of each kind: what every block says of itself is in its schema.
def test_block_is_shown_with_every_parameter_its_meaning_and_its_origin(show: Callable[..., str]) -> None:
    for kind, name in {kind: (kind, name) for kind, name in EVERY}.values():
        printed, entry = show(f"{kind}/{name}"), registry.lookup(kind, name)
        words, parameters = " ".join(printed.split()), entry.schema.parameters.values()
        assert all(p.name in printed and p.description[:30] in words for p in parameters)
        assert "provided by blockwright" in printed and entry.cls.__qualname__ in printed
        assert f"blockwright train model/{kind}={name}" in printed
        assert "required" in printed or not any(p.required and not p.child for p in parameters)
    assert "Literal['half_split', 'interleaved']" in show("position/rope")  # brackets are no markup


@pytest.mark.usefixtures("temporary_blocks")
def test_brackets_of_a_plug_ins_docstring_are_printed_as_written(show: Callable[..., str]) -> None:
    @register("norm", "bracketed")
    class Bracketed(Norm):
        """Scales x [b,t,d] by [bold]much[/].

        Args:
            table: shape [dim, heads]
        """

        def __init__(self, dim: int, table: list[str] = ["[red]"]) -> None:  # noqa: B006
            super().__init__()

    printed = show("norm/bracketed")
    assert all("Scales x [b,t,d] by [bold]much[/]." in shown for shown in (printed, show("norm")))
    assert "['[red]']" in printed and "shape [dim, heads]" in printed


@pytest.mark.parametrize(
    ("pattern", "there", "absent"),
    [
        ("attention/m*", "attention/mla attention/mha", "attention/gqa"),
        ("*/swiglu", "ffn/swiglu experts/swiglu", "ffn/gelu"),
        ("n*", "norm/rmsnorm", "ffn/swiglu"),
        ("model/deepseek_v*", "deepseek_v2_5", "gpt2"),
        ("model", "gpt2", "ffn/swiglu"),
    ],
)
def test_wildcards_select(show: Callable[..., str], pattern: str, there: str, absent: str) -> None:
    printed = show(pattern)
    assert all(t in printed for t in there.split()) and absent not in printed


def test_unknown_name_is_refused_with_the_nearest() -> None:
    meant = {"atention": "'attention'", "attention/mlaa": "'mla'", "attention/z*": "mla", "norm/gqa": "rmsnorm"}
    for argument, name in {**meant, "model/gtp2": "'gpt2'"}.items():
        with pytest.raises(ConfigError) as caught:
            main([argument])
        assert name in caught.value.remedy


def test_command_prints_and_returns_zero_and_a_mistake_64_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(main, ["attention/mla"]) == 0
    good = capsys.readouterr()
    assert "kv_lora_rank" in good.out and not good.err
    assert run_command(main, ["attention/mlaa"]) == 64
    bad = capsys.readouterr()
    assert not bad.out and "'mla'" in bad.err and "Traceback" not in bad.err


# --- printing ---------------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("columns", ["10", "400"])
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
    assert list(printing.lines(Table("a", "b"))) == ["a  b"] and list(printing.lines(Table("", ""))) == []
    assert list(printing.lines(Table("", "b"))) == ["  b"]  # a table whose first column needs no name


def test_terminal_gets_a_frame_of_its_width_and_a_pipe_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"COLUMNS": "70", "TERM": "xterm", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    file = Terminal()
    printing.show(a_table(), file)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())  # bold and colour
    assert max(map(len, shown.splitlines())) <= 70 and "│" in shown
    assert "attention/a_name_that_no_screen_cuts" in shown
    pipe = StringIO()
    printing.show_text("[b]", "a title", pipe)
    printing.console(pipe).print(LONG)
    assert pipe.getvalue() == f"a title:\n[b]\n{LONG}\n"


@pytest.mark.parametrize(
    ("module", "arguments", "word"),
    [
        ("blockwright.registry.__main__", ["attention"], "attention/sliding_window"),
        ("blockwright.lab.match.__main__", ["model=tiny", "model/attention=mha,sliding_window"], "sliding_window"),
    ],
)
def test_every_command_prints_whole_names_whatever_the_columns(
    module: str, arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert not importlib.import_module(module).main(arguments)
    printed = capsys.readouterr().out
    assert not re.search(r"\w…", printed) and "│" not in printed and word in printed


def test_no_command_prints_tables_in_a_way_of_its_own() -> None:
    packages = ("registry", "blocks", "training", "lab", "plugins")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py") if "tests" not in file.parts]
    own = [f.relative_to(ROOT).as_posix() for f in files if "import Console" in f.read_text()]
    assert sorted(own) == ["lab/sweep/table.py", "registry/printing.py"]  # the first, for its live display


def test_stream_whose_reader_has_gone_or_that_was_closed_takes_what_is_written() -> None:
    reading, writing = os.pipe()
    with open(writing, "w", buffering=1) as pipe:
        stream = printing.Outlived(pipe)
        print("seen", file=stream)  # type: ignore[call-overload]
        assert os.read(reading, 9) == b"seen\n" and not stream.isatty()
        os.close(reading)
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)  # type: ignore[call-overload]
    closed = printing.Outlived(None)
    assert closed.write("lost in the pipe!") == 17
    closed.flush()
    closed.stream.close()
