"""Where kinds and blocks are declared: read from the source files of this project and of plug-ins, importing nothing.

A file declares at the start of a line and with literals: ``@family("attention", root=…)``,
``@register("attention", "mla")`` or ``@readable`` (registry/index.py). Plug-ins come from installed distributions
through the entry-point group ``blockwright.blocks``, of which each names a module or a package. Only installed code
declares names: nothing is read from a path or a string in a configuration.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from blockwright.registry.plugins import source

ENTRY_POINTS = "blockwright.blocks"
PROJECT = "blockwright"
ROOMS = ("blockwright.blocks", "blockwright.training")  # packages of this project that hold kinds and blocks

_read: list[Index] = []
_FAMILY = re.compile(r"^@(?:\w+\.)*family\(([^()]*(?:\([^()]*\)[^()]*)*)\)$", re.MULTILINE)
_READABLE = re.compile(r"^@readable\n(?:@.*\n)*class (\w+)", re.MULTILINE)
_REGISTER = re.compile(
    r"""^@(?:\w+\.)*register\(\s*(["'])(?P<kind>\w+)\1,\s*(["'])(?P<name>\w+)\3\s*[,)]""", re.MULTILINE
)
_CALL = re.compile(r"(?<![\w.])(?:blockwright\.|registry\.)?(?:register|family)\(")


@dataclass(frozen=True)
class Declared:
    """A kind or a block in a file.

    Args:
        module: that declares it when imported
        provider: the distribution that the module belongs to
        root: of a kind, the part of the configuration that it belongs to
        in_layers: of a kind, whether layers may differ in it
    """

    module: str
    provider: str
    root: str = "model"
    in_layers: bool = True


@dataclass
class Index:
    """All declarations.

    Args:
        kinds: kind → its declaration
        blocks: kind → name → its declaration
        readable: dotted path of a class that untrusted files may name → its module (registry/index.py)
        providers: package or module → the distribution that it belongs to
    """

    kinds: dict[str, Declared] = field(default_factory=dict)
    blocks: dict[str, dict[str, Declared]] = field(default_factory=dict)
    readable: dict[str, str] = field(default_factory=dict)
    providers: dict[str, str] = field(default_factory=dict)

    def provider(self, module: str) -> str:
        """The distribution of a module; its top-level package, if no plug-in holds it."""
        parts = module.split(".")
        packages = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        return next((self.providers[package] for package in packages if package in self.providers), parts[0])

    def add(self, module: str, file: Path, provider: str) -> tuple[int, bool]:
        """Add the declarations of a file. A name that is taken stays its first owner's, with a warning.

        Returns:
            how many declarations the file has, and whether it registers in another form too, which only importing tells
        """
        text = file.read_text(encoding="utf-8", errors="replace")
        kinds, blocks, readable = _FAMILY.findall(text), [*_REGISTER.finditer(text)], _READABLE.findall(text)
        self.readable.update({f"{module}.{name}": module for name in readable})
        for arguments in kinds:
            kind, root, in_layers = _family(arguments)
            self.kinds.setdefault(kind, Declared(module, provider, root, in_layers))
        for kind, name in (match.group("kind", "name") for match in blocks):
            declared = Declared(module, provider)
            first = self.blocks.setdefault(kind, {}).setdefault(name, declared)
            if first != declared:
                rule = f"{kind} {name!r} is already registered by {first.provider} ({first.module})"
                warnings.warn(f"{rule}; {provider} ({module}) must pick another name", stacklevel=2)
        return len(kinds) + len(blocks) + len(readable), len(_CALL.findall(text)) > len(kinds) + len(blocks)


def _family(arguments: str) -> tuple[str, str, bool]:
    """Kind, root and in_layers from the text between the parentheses of ``@family``."""
    call = ast.parse(f"f({arguments})", mode="eval").body
    assert isinstance(call, ast.Call)
    given = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("root", "in_layers")}
    return ast.literal_eval(call.args[0]), given.get("root", "model"), given.get("in_layers", True)


def index() -> Index:
    """The declarations of this project, then of every installed plug-in; read once for a process.

    A plug-in that cannot be found only causes a warning. A file of one that registers in another form, such as names
    that it computes, is imported; so is a plug-in whose files declare nothing.
    """
    if not _read:
        known = Index(providers={PROJECT: PROJECT})
        _read.append(known)  # before plug-ins, which may register while they are imported
        for room in ROOMS:
            for module, file in _files(room, _place(room)):
                known.add(module, file, PROJECT)
        for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
            _add_plugin(known, point)
    return _read[0]


def forget() -> None:
    """Make the next ``index()`` read everything again."""
    _read.clear()


def _add_plugin(known: Index, point: EntryPoint) -> None:
    owner = point.dist.name if point.dist else point.value
    known.providers.setdefault(point.module, owner)
    try:
        added = {module: known.add(module, file, owner) for module, file in _files(point.module, _place(point.module))}
        unclear = [module for module, (_, other_forms) in added.items() if other_forms]
        for module in unclear if any(count for count, _ in added.values()) else [point.module]:
            importlib.import_module(module)
    except Exception as error:  # a plug-in may fail in any way; the others must still load
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"block plug-in {point.name!r} of {owner} did not load: {reason}", stacklevel=4)


def _place(module: str) -> Path:
    """The file of a module or the folder of a package.

    Raises:
        ModuleNotFoundError: there is none
    """
    place = source(module)
    if place is None:
        raise ModuleNotFoundError(f"No module named {module!r}")
    return place


def _files(module: str, place: Path) -> Iterator[tuple[str, Path]]:
    """Every module below a package with its file, or the one of a module."""
    if place.is_file():
        yield module, place
        return
    for folder, subfolders, names in os.walk(place):
        subfolders[:] = sorted(name for name in subfolders if name not in ("__pycache__", "tests"))
        inside = [module, *Path(folder).relative_to(place).parts]
        for name in sorted(names):
            if name.endswith(".py"):
                own = [] if name == "__init__.py" else [name.removesuffix(".py")]
                yield ".".join([*inside, *own]), Path(folder, name)


# --- classes that a folder from outside may name in ``_target_``: those that installed code declares ------------------


T = TypeVar("T", bound=type)
_declared: dict[str, type] = {}


def readable(cls: T) -> T:
    """Declare that the decorated class may be built from the plain values of an untrusted file.

    Its constructor, whatever it is given, reads no file, runs nothing and imports nothing that a value names.
    """
    _declared[f"{cls.__module__}.{cls.__qualname__}"] = cls
    return cls


def find_readable(target: Any, contract: type) -> type | None:
    """The declared class of a dotted path; None for any other. Only a module whose source declares it is imported.

    Args:
        target: from the file
        contract: the base class that it has to derive from
    """
    dotted = str(target)
    if dotted not in _declared and dotted in index().readable:
        importlib.import_module(index().readable[dotted])
    declared = _declared.get(dotted)
    return declared if declared is not None and issubclass(declared, contract) else None
