"""Names: what may be registered, under which name, by whom, and what a broken plug-in does to the others."""

from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.object_type import ObjectType
from torch import Tensor

from blockwright import registry
from blockwright.blocks.norm import Norm
from blockwright.registry import Composable, ConfigError, RegistrationError, catalogue, family, index, register
from hydra_plugins.blockwright_registry.source import RegistrySource

pytestmark = pytest.mark.usefixtures("temporary_blocks")


class Plain(Norm):
    """A norm of a plug-in."""

    def __init__(self, dim: int, eps: float = 0.5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x


def another(name: str = "Another", module: str = "another_package.norms") -> type:
    cls = type(name, (Plain,), {"__init__": Plain.__init__, "__doc__": Plain.__doc__})
    cls.__module__ = module
    return cls


def hydra_options(kind: str) -> list[str]:
    return RegistrySource("blockwright", "blockwright://").list(f"model/{kind}", ObjectType.CONFIG)


# --- registering ------------------------------------------------------------------------------------------------------


def test_decorator_returns_the_class_and_makes_it_a_name_and_a_hydra_option() -> None:
    assert register("norm", "plain")(Plain) is Plain
    entry = registry.lookup("norm", "plain")
    assert (entry.kind, entry.name, entry.cls) == ("norm", "plain", Plain)
    assert entry.schema.summary == "A norm of a plug-in." and "plain" in registry.names("norm")
    assert "plain" in hydra_options("norm")


def with_star(star: str) -> type:
    scope: dict[str, Any] = {"Plain": Plain}
    exec(f"class Open(Plain):\n    def __init__(self, dim: int, {star}) -> None: ...", scope)
    return scope["Open"]


MALFORMED = ["", "Plain", "2d", "with-dash", "with space", "a/b", "a.b", "_x", "name\n", "ñ"]
REFUSED: list[tuple[str, str, type, str]] = [
    ("nrom", "plain", Plain, "'norm'"),  # the nearest
    *(("norm", name, Plain, "cannot name") for name in MALFORMED),
    ("ffn", "plain", Plain, r"blockwright\.blocks\.ffn\.FFN"),  # the contract
    ("norm", "open", with_star("*args"), "every parameter"),
    ("norm", "open", with_star("**kwargs"), "every parameter"),
    ("norm", "rmsnorm", Plain, r"blockwright\.blocks\.norm\.RMSNorm"),  # whose it is
]


@pytest.mark.parametrize(("kind", "name", "cls", "named"), REFUSED)
def test_what_cannot_be_a_block_is_refused(kind: str, name: str, cls: type, named: str) -> None:
    before = registry.names(kind)
    with pytest.raises(RegistrationError, match=named):
        register(kind, name)(cls)
    assert registry.names(kind) == before


def test_taken_name_is_refused_and_both_owners_are_named() -> None:
    register("norm", "plain")(Plain)
    with pytest.raises(RegistrationError) as caught:
        register("norm", "plain")(another())
    assert f"{__name__}.Plain" in str(caught.value) and "another_package.norms.Another" in str(caught.value)
    assert registry.lookup("norm", "plain").cls is Plain
    assert registry.lookup("ffn", "swiglu").cls is not registry.lookup("experts", "swiglu").cls  # kinds share no names


def test_same_class_read_again_replaces_itself() -> None:
    """As when a notebook reloads a module."""
    register("norm", "plain")(another())
    newer = another()
    register("norm", "plain")(newer)
    assert registry.lookup("norm", "plain").cls is newer
    assert registry.lookup("norm", "plain").provider == "another_package"
    assert registry.lookup("norm", "rmsnorm").provider == "blockwright"


# --- families ---------------------------------------------------------------------------------------------------------


def test_plug_in_may_declare_a_family_and_fill_it() -> None:
    @family("stash", context=("slots",))
    class Memory(Composable):
        pass

    class Tape(Memory):
        """A tape."""

        def __init__(self, d_model: int, slots: int, length: int = 3) -> None: ...

    register("stash", "tape")(Tape)
    assert "stash" in registry.kinds() and registry.names("stash") == ["tape"]
    schema = registry.lookup("stash", "tape").schema
    assert schema.context == {"d_model", "slots"} and set(schema.parameters) == {"length"}
    with pytest.raises(RegistrationError, match=r"blockwright\.blocks\.norm\.Norm"):
        family("norm")(type("Other", (Composable,), {}))
    with pytest.raises(RegistrationError, match="must derive"):
        family("other")(type("Other", (), {}))
    assert registry.names("nonsense") == [] and registry.kinds() == sorted(registry.kinds())
    assert registry.names("attention", "?qa") == ["gqa", "mqa"]
    for kind, name in (("nonsense", "gqa"), ("attention", "nonsense")):
        with pytest.raises(KeyError):
            registry.lookup(kind, name)


# --- plug-ins ---------------------------------------------------------------------------------------------------------


BLOCK = """
from blockwright.blocks.norm import Norm
from blockwright.registry import register

{mark}@register("norm", "{name}")
class Block(Norm):
    def __init__(self, dim: int) -> None:
        super().__init__()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Put modules on the path, each with an entry point of its name; returns the warnings of reading them."""
    points: list[Any] = []
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(index, "entry_points", lambda group: points if group == "blockwright.blocks" else [])

    def put(**sources: str) -> list[str]:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
            value = SimpleNamespace(name=f"dist-{name}")
            points.append(SimpleNamespace(name=name, value=name, module=name, dist=value))
        importlib.invalidate_caches()
        index.forget()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            index.index()
        return [str(warning.message) for warning in seen]

    yield put
    for point in points:
        sys.modules.pop(point.name, None)
    monkeypatch.undo()
    index.forget()


def test_block_of_a_plugin_is_known_before_it_is_imported(install: Callable[..., list[str]]) -> None:
    assert not install(good_plugin=BLOCK.format(name="plain", mark=""))
    assert "plain" in registry.names("norm") and "plain" in hydra_options("norm")
    assert catalogue.provider("norm", "plain") == "dist-good_plugin" and "good_plugin" not in sys.modules
    entry = registry.lookup("norm", "plain")
    assert entry.provider == "dist-good_plugin" and entry.cls.__module__ == "good_plugin"
    register("norm", "later")(another("Later"))
    assert registry.lookup("norm", "later").provider == "another_package"


@pytest.mark.parametrize("error", ["ImportError('no flash')", "KeyError('x')"])
def test_broken_plugin_is_refused_by_name_and_stops_nothing(install: Callable[..., list[str]], error: str) -> None:
    good = BLOCK.format(name="plain", mark="")
    assert not install(a_bad=BLOCK.format(name="broken", mark=f"raise {error}\n"), b_good=good)
    assert registry.lookup("norm", "plain").provider == "dist-b_good" and registry.lookup("norm", "rmsnorm")
    with pytest.raises(ConfigError) as refused:
        registry.lookup("norm", "broken")
    assert refused.value.path == "model.norm" and "dist-a_bad" in refused.value.rule
    assert error.split("(")[0] in refused.value.rule
    with pytest.warns(UserWarning, match=r"norm/broken .*dist-a_bad"):
        catalogue.load.__wrapped__()
    assert "broken" not in registry.names("norm")


def test_every_form_of_registration_is_found(install: Callable[..., list[str]]) -> None:
    forms = BLOCK.format(name="literal", mark="")
    forms += BLOCK.format(name="single", mark="").replace('"norm", "single"', "'norm', 'single'")
    forms += BLOCK.format(name="dotted", mark="import blockwright\n\n").replace("@register", "@blockwright.register")
    forms += "\nfor name in ('first', 'second'):\n"
    forms += "    register('norm', f'of_a_loop_{name}')(type('Made', (Block,), {}))\n"
    computed = BLOCK.format(name="x", mark="").replace('"norm", "x"', '"norm", "y" * 3')  # imported to know it
    assert not install(forms=forms, computing=computed)
    found = {name for name in registry.names("norm") if catalogue.provider("norm", name) == "dist-forms"}
    assert found == {"literal", "single", "dotted", "of_a_loop_first", "of_a_loop_second"}
    assert all(registry.lookup("norm", name).provider == "dist-forms" for name in found)
    assert registry.lookup("norm", "yyy").provider == "dist-computing"


def test_plugin_that_cannot_be_imported_or_takes_a_name_warns_with_its_owner(install: Callable[..., list[str]]) -> None:
    thief, wreck = install(wreck="import a_package_that_is_not_installed", thief=BLOCK.format(name="rmsnorm", mark=""))
    assert "dist-wreck" in wreck and "dist-thief" in thief and "blockwright.blocks.norm" in thief
    assert registry.lookup("norm", "rmsnorm").provider == "blockwright"
    with pytest.raises(RegistrationError, match="blockwright"):
        importlib.import_module("thief")


def test_file_declares_what_importing_it_registers() -> None:
    """Else a block would be missing from the catalogue, or a name would be in it that no module registers."""
    declared = {(kind, name, d.module) for kind, names in index.index().blocks.items() for name, d in names.items()}
    entries = [registry.lookup(kind, name) for kind in registry.kinds(None) for name in registry.names(kind)]
    registered = {(entry.kind, entry.name, entry.cls.__module__) for entry in entries}
    ours, theirs = ({row for row in rows if row[2].startswith("blockwright.")} for rows in (declared, registered))
    assert ours == theirs
    for kind, found in index.index().kinds.items():
        family = registry.catalogue.find_family(kind)
        assert (family.root, family.in_layers, family.contract.__module__) == (
            found.root,
            found.in_layers,
            found.module,
        )


def test_nothing_is_imported_to_list_names() -> None:
    code = "import sys\nfrom blockwright import registry\n[registry.names(k) for k in registry.kinds(None)]\n"
    large = "('blockwright.blocks', 'blockwright.training', 'torch')"
    code += f"assert not [m for m in sys.modules if m.startswith({large})]"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(registry.__file__).parent.parent)
