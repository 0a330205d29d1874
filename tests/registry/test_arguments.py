"""Command lines of KEY=VALUE words are taken apart in one way, and wrong ones are refused."""

from __future__ import annotations

import pytest

from blockwright.registry import ConfigError
from blockwright.registry.arguments import read_arguments


def read(*arguments: str, n_names: int = 1):  # type: ignore[no-untyped-def]
    return read_arguments(arguments, options=("by", "tol"), flags=("--json", "--plot=FILE"), n_names=n_names)


def test_words_are_options_overrides_flags_and_names() -> None:
    found = read("mine", "by=d_ff", "model.x=a=b", "~logger", "+k=1", "--json", "--plot", "a.png")
    assert found.names == ["mine"] and found.options == {"by": "d_ff"}
    assert found.overrides == ["model.x=a=b", "~logger", "+k=1"] and found.flags == {"--json": "", "--plot": "a.png"}


def test_value_of_a_flag_is_no_option() -> None:
    assert read("--plot", "by=d_ff").flags == {"--plot": ""}
    assert read("--plot=by=d.png").flags == {"--plot": "by=d.png"}


@pytest.mark.parametrize(
    ("arguments", "where", "remedy"),
    [
        (["--jsn"], "--jsn", "Did you mean '--json'?"),
        (["-m"], "-m", "already runs all values"),
        (["--json=yes"], "yes", "Write --json"),
        (["one", "two"], "two", "one at a time"),
        (["one", "by"], "by", "Write by=VALUE"),
        (["by=d_ff", "by=d_model"], "d_model", "Leave one of them out"),
    ],
)
def test_wrong_word_is_refused_with_a_remedy(arguments: list[str], where: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as told:
        read(*arguments)
    assert told.value.value == where and remedy in told.value.remedy


def test_word_that_is_no_key_and_value_is_taken_for_a_model() -> None:
    with pytest.raises(ConfigError, match="model=tiny"):
        read("tiny", n_names=0)
