"""The public names: listed once, imported when used, documented."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

import blockwright
from blockwright import api
from blockwright.lazy import read_stub


def test_every_public_name_is_what_the_stub_says_and_has_a_docstring_of_its_own() -> None:
    for name, (module, original) in read_stub(api.STUB).items():
        value = getattr(blockwright, name)
        assert value is getattr(sys.modules[module], original)
        if isinstance(value, type) or (callable(value) and hasattr(value, "__code__")):
            inherited = [base.__doc__ for base in getattr(value, "__mro__", ())[1:]]
            assert value.__doc__ and value.__doc__ not in inherited, name
    with pytest.raises(AttributeError):
        blockwright.composed  # noqa: B018
    assert blockwright.__version__ == version("blockwright")


def test_import_and_help_load_neither_torch_nor_lightning() -> None:
    code = (
        "import sys, blockwright; from blockwright.command import run; dir(blockwright); run(['--help']);"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "describe" in done.stdout, done.stderr


def test_page_of_the_interface_is_current_and_lists_every_name_once() -> None:
    assert api.PAGE.read_text() == api.markdown(), "run: python -m blockwright.api > docs/api.md"
    listed = [name for _, names in api.sections() for name in names]
    assert sorted(listed) == sorted(read_stub(api.STUB))
