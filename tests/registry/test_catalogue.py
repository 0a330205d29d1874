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
from blockwright.blocks.norm.base import Norm
from blockwright.registry import Composable, ConfigError, RegistrationError, catalogue, family, index, register
from hydra_plugins.blockwright_registry.source import RegistrySource

pytestmark = pytest.mark.usefixtures("temporary_blocks")


class Plain(Norm):
    """A norm of a plug-in.

    Args:
        eps: added somewhere
    """

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


def test_fixture_takes_temporary_names_away_again() -> None:
    assert "plain" not in registry.names("norm") and "plain" not in hydra_options("norm")


def test_unknown_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(RegistrationError, match=r"there is no family 'nrom'.*'norm'"):
        register("nrom", "plain")(Plain)


@pytest.mark.parametrize("name", ["", "Plain", "2d", "with-dash", "with space", "a/b", "a.b", "_x", "name\n", "ñ"])
def test_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(RegistrationError, match="cannot name a block"):
        register("norm", name)(Plain)
    assert name not in registry.names("norm")


def test_class_outside_the_contract_is_refused() -> None:
    with pytest.raises(
        RegistrationError, match=r"must derive from blockwright\.blocks\.ffn\.base\.FFN, the contract of ffn"
    ):
        register("ffn", "plain")(Plain)
    assert "plain" not in registry.names("ffn")


@pytest.mark.parametrize("star", ["*args", "**kwargs"])
def test_open_ended_constructor_is_refused(star: str) -> None:
    scope: dict[str, Any] = {"Plain": Plain}
    exec(f"class Open(Plain):\n    def __init__(self, dim: int, {star}) -> None: ...", scope)
    with pytest.raises(RegistrationError, match="name every parameter"):
        register("norm", "open")(scope["Open"])
    assert "open" not in registry.names("norm") and "open" not in hydra_options("norm")


def test_taken_name_is_refused_and_both_owners_are_named() -> None:
    register("norm", "plain")(Plain)
    with pytest.raises(RegistrationError) as caught:
        register("norm", "plain")(another())
    message = str(caught.value)
    assert "already registered by" in message and f"{__name__}.Plain" in message
    assert "another_package (another_package.norms.Another)" in message
    assert registry.lookup("norm", "plain").cls is Plain


def test_built_in_cannot_be_taken_over() -> None:
    with pytest.raises(
        RegistrationError, match=r"already registered by blockwright \(blockwright\.blocks\.norm\.rmsnorm\.RMSNorm\)"
    ):
        register("norm", "rmsnorm")(Plain)


def test_same_class_read_again_replaces_itself() -> None:
    """As when a notebook reloads a module."""
    register("norm", "plain")(another())
    newer = another()
    register("norm", "plain")(newer)
    assert registry.lookup("norm", "plain").cls is newer


def test_kinds_do_not_share_names() -> None:
    assert registry.lookup("ffn", "swiglu").cls is not registry.lookup("experts", "swiglu").cls


def test_provider_is_the_distribution_or_the_top_package() -> None:
    register("norm", "plain")(another())
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


def test_family_of_another_contract_cannot_take_a_kind() -> None:
    with pytest.raises(RegistrationError, match=r"already has the contract blockwright\.blocks\.norm\.base\.Norm"):

        @family("norm")
        class Other(Composable):
            pass


def test_contract_must_be_composable() -> None:
    with pytest.raises(RegistrationError, match="must derive"):

        @family("stash")
        class Other:
            pass


# --- looking up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*", ["gqa", "mha", "mla", "mqa"]),
        ("m*", ["mha", "mla", "mqa"]),
        ("?qa", ["gqa", "mqa"]),
        ("[gm]qa", ["gqa", "mqa"]),
        ("mla", ["mla"]),
        ("MLA", []),
        ("nothing*", []),
    ],
)
def test_names_match_wildcards_in_alphabetical_order(pattern: str, found: list[str]) -> None:
    built_in = {"gqa", "mha", "mla", "mqa"}
    assert [n for n in registry.names("attention", pattern) if n in built_in] == found
    assert registry.names("attention", pattern) == sorted(registry.names("attention", pattern))


def test_unknown_kind_has_no_names_and_unknown_entries_are_key_errors() -> None:
    assert registry.names("nonsense") == []
    for kind, name in (("nonsense", "gqa"), ("attention", "nonsense")):
        with pytest.raises(KeyError):
            registry.lookup(kind, name)


def test_kinds_are_all_families_of_the_house() -> None:
    families = {"attention", "balance", "experts", "ffn", "gating", "norm", "position", "residual"}
    families |= {"dropping", "mixing", "output_gate", "qk_norm", "scores", "selector", "values"}
    assert families <= set(registry.kinds()) and registry.kinds() == sorted(registry.kinds())


# --- plug-ins ---------------------------------------------------------------------------------------------------------


BLOCK = """
from blockwright.blocks.norm.base import Norm
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


def test_plugin_that_computes_its_names_is_imported_to_know_them(install: Callable[..., list[str]]) -> None:
    computed = BLOCK.format(name="x", mark="").replace('@register("norm", "x")', '@register("norm", "y" * 3)')
    assert not install(computing=computed)
    assert "yyy" in registry.names("norm") and registry.lookup("norm", "yyy").provider == "dist-computing"


def test_every_form_of_registration_is_found(install: Callable[..., list[str]]) -> None:
    literal = BLOCK.format(name="literal", mark="")
    forms = literal + BLOCK.format(name="single", mark="").replace('"norm", "single"', "'norm', 'single'")
    forms += BLOCK.format(name="dotted", mark="import blockwright\n\n").replace("@register", "@blockwright.register")
    forms += (
        "\nfor name in ('first', 'second'):\n    register('norm', f'of_a_loop_{name}')(type('Made', (Block,), {}))\n"
    )
    assert not install(forms=forms)
    found = {name for name in registry.names("norm") if catalogue.provider("norm", name) == "dist-forms"}
    assert found == {"literal", "single", "dotted", "of_a_loop_first", "of_a_loop_second"}
    assert all(registry.lookup("norm", name).provider == "dist-forms" for name in found)


def test_plugin_that_declares_nothing_and_cannot_be_imported_warns(install: Callable[..., list[str]]) -> None:
    (warning,) = install(wreck="import a_package_that_is_not_installed")
    assert "'wreck' of dist-wreck" in warning and "ModuleNotFoundError" in warning


def test_plugin_that_takes_a_name_warns_with_both_owners(install: Callable[..., list[str]]) -> None:
    (warning,) = install(thief=BLOCK.format(name="rmsnorm", mark=""))
    assert all(word in warning for word in ("thief", "dist-thief", "blockwright.blocks.norm.rmsnorm"))
    assert registry.lookup("norm", "rmsnorm").provider == "blockwright"
    with pytest.raises(RegistrationError, match=r"already registered by blockwright"):
        importlib.import_module("thief")


def test_file_declares_what_importing_it_registers() -> None:
    """Else a block would be missing from the catalogue, or a name would be in it that no module registers."""
    declared = {(kind, name, d.module) for kind, names in index.index().blocks.items() for name, d in names.items()}
    registered = {
        (kind, name, entry.cls.__module__)
        for kind in registry.kinds(None)
        for name in registry.names(kind)
        for entry in [registry.lookup(kind, name)]
    }
    assert {(k, n, m) for k, n, m in declared if m.startswith("blockwright.")} == {
        (k, n, m) for k, n, m in registered if m.startswith("blockwright.")
    }
    for kind, found in index.index().kinds.items():
        family = registry.catalogue.find_family(kind)
        assert (family.root, family.in_layers, family.contract.__module__) == (
            found.root,
            found.in_layers,
            found.module,
        )


def test_nothing_is_imported_to_list_names() -> None:
    code = "import sys\nfrom blockwright import registry\n[registry.names(k) for k in registry.kinds(None)]\n"
    code += (
        "assert not [m for m in sys.modules if m.startswith(('blockwright.blocks', 'blockwright.training', 'torch'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(registry.__file__).parent.parent)


def test_registry_imports_no_block() -> None:
    code = "import sys\nfrom blockwright import registry\n"
    code += "assert not any(m.startswith(('blockwright.blocks', 'torch')) for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(registry.__file__).parent.parent)
