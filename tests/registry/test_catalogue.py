"""Names: what may be registered, under which name, by whom, and what a broken plug-in does to the others."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.object_type import ObjectType
from torch import Tensor

from blockwright import registry
from blockwright.blocks.norm.base import Norm
from blockwright.registry import Composable, RegistrationError, catalogue, family, register
from hydra_plugins.blockwright_registry.source import RegistrySource

pytestmark = pytest.mark.usefixtures("temporary_blocks")


class Plain(Norm):
    """A norm of a guest.

    Args:
        eps: added somewhere
    """

    def __init__(self, dim: int, eps: float = 0.5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x


def another(name: str = "Another", module: str = "somebody_else.norms") -> type:
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
    assert entry.schema.summary == "A norm of a guest." and "plain" in registry.names("norm")
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
    assert "somebody_else (somebody_else.norms.Another)" in message
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
    assert registry.lookup("norm", "plain").provider == "somebody_else"
    assert registry.lookup("norm", "rmsnorm").provider == "blockwright"


# --- families ---------------------------------------------------------------------------------------------------------


def test_guest_may_declare_a_family_and_fill_it() -> None:
    @family("memory", context=("slots",))
    class Memory(Composable):
        pass

    class Tape(Memory):
        """A tape."""

        def __init__(self, d_model: int, slots: int, length: int = 3) -> None: ...

    register("memory", "tape")(Tape)
    assert "memory" in registry.kinds() and registry.names("memory") == ["tape"]
    schema = registry.lookup("memory", "tape").schema
    assert schema.context == {"d_model", "slots"} and set(schema.parameters) == {"length"}


def test_family_of_another_contract_cannot_take_a_kind() -> None:
    with pytest.raises(RegistrationError, match=r"already has the contract blockwright\.blocks\.norm\.base\.Norm"):

        @family("norm")
        class Other(Composable):
            pass


def test_contract_must_be_composable() -> None:
    with pytest.raises(RegistrationError, match="must derive"):

        @family("memory")
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


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Entry points by name: a callable stands for what importing the plug-in does."""
    code: dict[str, Any] = {}

    class Point:
        def __init__(self, name: str) -> None:
            self.name, self.value, self.dist = name, f"{name}.blocks", SimpleNamespace(name=f"dist-{name}")

        def load(self) -> None:
            code[self.name]()

    monkeypatch.setattr(
        catalogue, "entry_points", lambda group: [Point(n) for n in code if group == "blockwright.blocks"]
    )
    yield code


def test_plugin_registers_in_the_name_of_its_distribution(plugins: dict[str, Any]) -> None:
    plugins["good"] = lambda: register("norm", "plain")(another())
    catalogue.load.__wrapped__()
    assert registry.lookup("norm", "plain").provider == "dist-good"
    register("norm", "later")(another("Later"))
    assert registry.lookup("norm", "later").provider == "somebody_else"


@pytest.mark.parametrize(
    "error", [ImportError("no flash"), RuntimeError("CUDA is away"), SyntaxError("bad"), KeyError("x")]
)
def test_broken_plugin_warns_with_name_and_reason_and_stops_nothing(plugins: dict[str, Any], error: Exception) -> None:
    def fails() -> None:
        raise error

    plugins.update({"a_bad": fails, "b_good": lambda: register("norm", "plain")(another())})
    with pytest.warns(UserWarning, match="did not load") as caught:
        catalogue.load.__wrapped__()
    (warning,) = caught
    message = str(warning.message)
    assert "'a_bad' of dist-a_bad" in message and f"{type(error).__name__}: {error}" in message
    assert registry.lookup("norm", "plain").provider == "dist-b_good"
    assert registry.lookup("norm", "rmsnorm")


def test_plugin_that_wants_a_taken_name_warns_with_both_owners(plugins: dict[str, Any]) -> None:
    plugins["thief"] = lambda: register("norm", "rmsnorm")(another())
    with pytest.warns(UserWarning) as caught:
        catalogue.load.__wrapped__()
    assert all(w in str(caught[0].message) for w in ("thief", "dist-thief", "blockwright", "RMSNorm"))
    assert registry.lookup("norm", "rmsnorm").provider == "blockwright"


def test_plugins_load_in_the_order_of_their_names(plugins: dict[str, Any]) -> None:
    seen: list[str] = []
    plugins.update({n: (lambda n=n: seen.append(n)) for n in ("c", "a", "b")})
    catalogue.load.__wrapped__()
    assert seen == ["a", "b", "c"]


def test_module_of_an_entry_point_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
        from blockwright.blocks.norm.base import Norm
        from blockwright.registry import register

        @register("norm", "plain")
        class Plain(Norm):
            def __init__(self, dim: int) -> None:
                super().__init__()
    """
    (tmp_path / "guest_of_a_test.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("guest", "guest_of_a_test", "blockwright.blocks")
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [point])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        catalogue.load.__wrapped__()
    assert registry.lookup("norm", "plain").cls.__module__ == "guest_of_a_test"
    del sys.modules["guest_of_a_test"]


def test_registry_imports_no_block() -> None:
    code = "import sys\nfrom blockwright import registry\n"
    code += "assert not any(m.startswith(('blockwright.blocks', 'torch')) for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(registry.__file__).parent.parent)
