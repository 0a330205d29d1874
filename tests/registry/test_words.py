"""Command lines of flags and KEY=VALUE words are sorted in one way, and wrong ones are refused."""

from __future__ import annotations

from argparse import Namespace

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.command import Parser
from blockwright.registry.words import Words, read_words


def read(*arguments: str, n_names: int = 1) -> tuple[Namespace, Words]:
    parser = Parser(prog="blockwright mine")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    return read_words(parser, arguments, ("by", "tol", "cache.bits"), n_names)


def test_words_are_settings_overrides_flags_and_names() -> None:
    flags, words = read(
        "mine", "by=d_ff", "model.x=a=b", "~logger", "--json", "+k=1", "cache.bits=6", "--plot", "a.png"
    )
    assert words.names == ["mine"] and words.settings == {"by": "d_ff", "cache.bits": "6"}
    assert words.overrides == ["model.x=a=b", "~logger", "+k=1"] and flags.json and flags.plot == "a.png"


def test_value_of_a_flag_is_no_setting() -> None:
    assert read("--plot=by=d.png")[0].plot == "by=d.png"


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--jsn"], "Did you mean '--json'?"),
        (["by=d_ff", "-m"], "already runs all values"),
        (["--json=yes"], "See blockwright mine --help"),
        (["one", "two"], "one at a time"),
        (["one", "by"], "Write by=VALUE"),
        (["by=d_ff", "by=d_model"], "Leave one of them out"),
    ],
)
def test_wrong_word_is_refused_with_a_remedy(arguments: list[str], remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(*arguments)
    assert remedy in refused.value.remedy


def test_word_that_is_no_key_and_value_is_taken_for_a_model() -> None:
    with pytest.raises(ConfigError, match="model=tiny"):
        read("tiny", n_names=0)
