"""``python -m blockwright.registry``: the catalogue as one reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from blockwright import registry
from blockwright.blocks.norm.base import Norm
from blockwright.registry import ConfigError, register
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


def test_everything_is_listed_with_its_summary(show: Callable[..., str]) -> None:
    printed = show()
    for kind, name in EVERY:
        assert f"{kind}/{name}" in printed
        assert registry.lookup(kind, name).schema.summary[:40] in printed


@pytest.mark.parametrize("kind", registry.kinds())
def test_kind_is_listed_without_the_parameters_of_its_blocks(show: Callable[..., str], kind: str) -> None:
    for printed in (show(kind), show(f"{kind}/")):
        assert all(f"{kind}/{name}" in printed for name in registry.names(kind))
        assert not any(f"{k}/{n}" in printed for k, n in EVERY if k != kind)
        assert max(map(len, printed.splitlines())) < 300


# One of each kind: what every block says of itself is in its schema.
@pytest.mark.parametrize(("kind", "name"), {kind: (kind, name) for kind, name in EVERY}.values())
def test_block_is_shown_with_every_parameter_its_meaning_and_its_origin(
    show: Callable[..., str], kind: str, name: str
) -> None:
    printed = show(f"{kind}/{name}")
    entry = registry.lookup(kind, name)
    words = " ".join(printed.split())
    for p in entry.schema.parameters.values():
        assert p.name in printed and p.description[:30] in words
    assert "provided by blockwright" in printed and entry.cls.__qualname__ in printed
    assert f"blockwright train model/{kind}={name}" in printed
    assert "required" in printed or not any(p.required and not p.child for p in entry.schema.parameters.values())


def test_choices_survive_the_terminals_markup(show: Callable[..., str]) -> None:
    assert "Literal['half_split', 'interleaved']" in show("position/rope")


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

    for printed in (show("norm/bracketed"), show("norm")):
        assert "Scales x [b,t,d] by [bold]much[/]." in printed
    assert "['[red]']" in show("norm/bracketed")
    assert "shape [dim, heads]" in show("norm/bracketed")


@pytest.mark.parametrize(
    ("pattern", "there", "absent"),
    [
        ("attention/m*", ["attention/mla", "attention/mha"], ["attention/gqa"]),
        ("*/swiglu", ["ffn/swiglu", "experts/swiglu"], ["ffn/gelu"]),
        ("n*", ["norm/rmsnorm"], ["ffn/swiglu"]),
    ],
)
def test_wildcards_select(show: Callable[..., str], pattern: str, there: list[str], absent: list[str]) -> None:
    printed = show(pattern)
    assert all(t in printed for t in there) and not any(a in printed for a in absent)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ("atention", "'attention'"),
        ("attention/mlaa", "'mla'"),
        ("attention/z*", "mla"),
        ("norm/gqa", "rmsnorm"),
        ("model/gtp2", "'gpt2'"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(argument: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main([argument])
    assert meant in caught.value.remedy


def test_models_are_listed_with_what_they_are(show: Callable[..., str]) -> None:
    printed = show("model/deepseek_v*")
    assert "deepseek_v2_5" in printed and "V2 with the softmax's temperature" in printed and "gpt2" not in printed
    assert "gpt2" in show("model")


def test_command_prints_and_returns_zero_and_a_mistake_64_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(main, ["attention/mla"]) == 0
    good = capsys.readouterr()
    assert "kv_lora_rank" in good.out and not good.err
    assert run_command(main, ["attention/mlaa"]) == 64
    bad = capsys.readouterr()
    assert not bad.out and "Did you mean 'mla'?" in bad.err and "Traceback" not in bad.err
