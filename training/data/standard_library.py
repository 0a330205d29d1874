"""The source code of the running interpreter's standard library: real code with no download.

About 1,800 files and 31 MB. It differs between versions of Python, so losses on it compare only within one. Its license
is the PSF's. Packages that are installed beside it, and files that test how broken text is read, are left out.
"""

from __future__ import annotations

import sysconfig
from functools import cached_property
from pathlib import Path

from blockwright.registry.errors import ConfigError
from blockwright.registry.index import readable
from blockwright.training.data.text import TextFiles

LEFT_OUT = ("site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3")


@readable
class StandardLibrary(TextFiles):
    """The standard library, a document each file; a twentieth of the files each to validate and to test on."""

    def __init__(self) -> None:
        super().__init__(files="*.py")

    @cached_property
    def _paths(self) -> list[Path]:
        folder = Path(sysconfig.get_path("stdlib"))
        kept = sorted(file for file in folder.rglob("*.py") if not {*file.relative_to(folder).parts[:-1]} & {*LEFT_OUT})
        if not kept:
            rule = "the standard library of this interpreter has no source files"
            raise ConfigError("data.corpus", str(folder), rule, "Name files of your own: data=text")
        return kept

    def is_small(self) -> bool:
        """False: decoding all of it takes seconds."""
        return False
