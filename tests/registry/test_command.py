"""How command lines are read and end: a mistake, a full disk or a missing package in one message, by its code."""

from __future__ import annotations

import errno
import json
import math
import resource
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint.manifest import whole
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, Words, read_words, run_command, strict_json
from blockwright.registry.errors import os_error_of, refusal_of_full, require
from blockwright.registry.folder import write_text
from blockwright.training.entry.main import refusal_of


def parser() -> Parser:
    parser = Parser(prog="python -m some.thing")
    parser.add_argument("--temperature", type=float)
    return parser


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--temperatur=1"], "'--temperature'"), (["--temperature=hot"], "'hot'"), (["--nothing", "it"], "--nothing")],
)
def test_wrong_argument_is_one_message_and_code_64(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(lambda given: parser().parse_args(given) and None, arguments) == 64
    shown = capsys.readouterr()
    assert told in shown.err and "usage:" not in shown.err and "Traceback" not in shown.err and not shown.out


def test_command_ends_with_its_code_that_of_an_interruption_or_that_of_a_refusal() -> None:
    def ending(outcome: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    codes = {None: 0, 3: 3, KeyboardInterrupt(): 130, ConfigError("a", 1, "is b", "Write c"): 64}
    for outcome, code in codes.items():
        assert run_command(lambda given, outcome=outcome: ending(outcome), []) == code
    with pytest.raises(ZeroDivisionError):  # a fault of ours is not hidden
        run_command(lambda given: 1 // 0, [])


# --- words ------------------------------------------------------------------------------------------------------------


def read(*arguments: str, n_names: int = 1) -> tuple[Namespace, Words]:
    parser = Parser(prog="blockwright mine")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", metavar="FILE")
    return read_words(parser, arguments, ("by", "tol", "cache.bits"), n_names)


def test_words_are_settings_overrides_flags_and_names() -> None:
    line = "mine by=d_ff model.x=a=b ~logger --json +k=1 cache.bits=6 --plot a.png"
    flags, words = read(*line.split())
    assert words.names == ["mine"] and words.settings == {"by": "d_ff", "cache.bits": "6"}
    assert words.overrides == ["model.x=a=b", "~logger", "+k=1"] and flags.json and flags.plot == "a.png"
    assert read("--plot=by=d.png")[0].plot == "by=d.png"  # the value of a flag is no setting


@pytest.mark.parametrize("line", ["--jsn", "by=d_ff -m", "--json=yes", "one two", "one by", "by=d_ff by=d_model"])
def test_wrong_word_is_refused_with_a_remedy(line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(*line.split())
    assert refused.value.remedy


def test_word_that_is_no_key_and_value_is_taken_for_a_model() -> None:
    with pytest.raises(ConfigError, match="model=tiny"):
        read("tiny", n_names=0)


# --- a full disk ------------------------------------------------------------------------------------------------------

LARGE = 100_000


@contextmanager
def full() -> Iterator[None]:
    """No file grows beyond a kilobyte: not for longer, as pytest may write its lines to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_command_and_training_say_what_could_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with full():
        code = run_command(lambda given: write_text(tmp_path / "table.csv", "x" * LARGE), [])
    shown = capsys.readouterr().err
    assert code == 64 and str(tmp_path / "table.csv") in shown and "Traceback" not in shown
    with pytest.raises(OSError) as caught, full():
        write_text(tmp_path / "results.json", "x" * LARGE)
    refusal = refusal_of(caught.value, [])
    assert refusal is not None and refusal.value == str(tmp_path / "results.json")
    with pytest.raises(ConfigError), full(), whole(tmp_path / "out") as made, (made / "last.ckpt").open("wb") as file:
        torch.save({"weights": torch.zeros(LARGE)}, file)
    assert not list(tmp_path.iterdir())


def test_other_errors_and_one_that_hides_what_was_before_are_none_of_a_full_disk() -> None:
    assert refusal_of_full(OSError(errno.ENOENT, "No such file")) is None
    assert refusal_of_full(RuntimeError("shapes")) is None
    full = OSError(errno.ENOSPC, "No space left on device", "f")
    for hides in (False, True):
        try:
            try:
                raise full
            except OSError:
                if hides:
                    raise RuntimeError("shapes") from None
                raise RuntimeError("torch: unexpected position") from full
        except RuntimeError as error:
            found = error
        assert os_error_of(found) is (None if hides else full)


def test_missing_packages_are_named_with_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "missing_one", None)
    require("lab", "json", path="part")
    with pytest.raises(ConfigError) as caught:
        require("lab", "json", "missing_one", "missing_two", path="part", value=3, otherwise="or write part=2")
    assert (caught.value.path, caught.value.value) == ("part", 3)
    assert "(missing_one, missing_two)" in caught.value.rule and "'blockwright[lab]'" in caught.value.remedy


def test_document_of_a_diverged_run_is_strict_json() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    document = {"losses": [1.5, math.nan, (math.inf, {"µ": -math.inf})], "seeds": 3, "kept": True}
    expected = {"losses": [1.5, None, [None, {"µ": None}]], "seeds": 3, "kept": True}
    assert json.loads(strict_json(document), parse_constant=refuse) == expected
