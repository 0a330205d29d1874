"""How command lines end: a mistake in one message, an interruption by its code, a reader that has gone in silence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command


def parser() -> Parser:
    parser = Parser(prog="python -m some.thing")
    parser.add_argument("--temperature", type=float)
    return parser


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--temperatur=1"], "Did you mean '--temperature'?"),
        (["--temperature=hot"], "invalid float value: 'hot'"),
        (["--nothing", "--like", "it"], "unrecognized arguments"),
    ],
)
def test_wrong_argument_is_one_message_and_code_64(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda given: parser().parse_args(given) and None, arguments) == 64
    shown = capsys.readouterr()
    assert told in shown.err and "usage:" not in shown.err and "Traceback" not in shown.err and not shown.out


def test_code_of_the_command_is_the_code_of_the_process() -> None:
    assert run_command(lambda given: None, []) == 0
    assert run_command(lambda given: len(given), ["a", "b", "c"]) == 3


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (ConfigError("a", 1, "is b", "Write c"), 64)])
def test_interruption_and_refusal_have_their_codes(raised: BaseException, code: int) -> None:
    def command(arguments: Sequence[str]) -> None:
        raise raised

    assert run_command(command, []) == code


def test_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(lambda given: 1 // 0, [])
