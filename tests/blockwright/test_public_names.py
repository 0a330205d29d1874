"""The public names: listed once, imported when used, documented."""

from __future__ import annotations

import subprocess
import sys

import pytest

import blockwright
from blockwright import api
from blockwright.lazy import read_stub


def test_every_public_name_is_what_the_stub_says() -> None:
    for name, (module, original) in read_stub(api.STUB).items():
        assert getattr(blockwright, name) is getattr(sys.modules[module], original)


def test_every_public_name_has_a_docstring_of_its_own() -> None:
    for name in read_stub(api.STUB):
        value = getattr(blockwright, name)
        if isinstance(value, type) or (callable(value) and hasattr(value, "__code__")):
            inherited = [base.__doc__ for base in getattr(value, "__mro__", ())[1:]]
            assert value.__doc__ and value.__doc__ not in inherited, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'composed'"):
        blockwright.composed  # noqa: B018


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert blockwright.__version__ == version("blockwright")


def test_import_and_help_load_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, blockwright; from blockwright.command import run; dir(blockwright); run(['--help']);"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "describe" in done.stdout, done.stderr


def test_page_of_the_interface_is_current() -> None:
    assert api.PAGE.read_text() == api.markdown(), "run: python -m blockwright.api > docs/api.md"


def test_page_lists_every_public_name_once() -> None:
    listed = [name for _, names in api.sections() for name in names]
    assert sorted(listed) == sorted(read_stub(api.STUB))
