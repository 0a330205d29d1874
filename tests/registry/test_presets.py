"""Presets: where they are found, what they inherit, and that an untrusted one is no more than data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from blockwright.blocks.compose import check, preset
from blockwright.registry import ConfigError, plugins, presets
from blockwright.registry.limits import MAX_BYTES
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of

SMALL = "vocab_size: 61\nd_model: 48\nn_layers: 2\nattention: {n_heads: 4}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts presets into a folder that BLOCKWRIGHT_PRESETS names."""

    def put(folder: str = "mine", **texts: str) -> Path:
        directory = tmp_path / folder
        directory.mkdir(exist_ok=True)
        for name, text in texts.items():
            (directory / f"{name}.yaml").write_text(text)
        known = os.environ.get(presets.VARIABLE, "").split(os.pathsep)
        monkeypatch.setenv(presets.VARIABLE, os.pathsep.join(dict.fromkeys([*filter(None, known), str(directory)])))
        return directory

    monkeypatch.delenv(presets.VARIABLE, raising=False)
    return put


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes entry points of plug-ins: name → the package that holds presets."""

    def offer(**packages: str) -> None:
        points = [EntryPoint(name, package, presets.ENTRY_POINTS) for name, package in packages.items()]
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)
        presets._of_plugins.cache_clear()

    yield offer
    monkeypatch.undo()
    presets._of_plugins.cache_clear()


# --- where they are ---------------------------------------------------------------------------------------------------


def test_file_in_a_folder_of_the_users_is_a_preset(write: Callable[..., Path]) -> None:
    write(colleague=f"# A small one.\ninherits: llama2_7b\n{SMALL}")
    assert "colleague" in presets.names() and presets.find("colleague").summary == "A small one."
    assert preset("colleague")["attention"] == {"name": "mha", "n_heads": 4}
    model = compose_config(["model=colleague", "model.attention.n_heads=8"]).model
    assert (model.d_model, model.attention.name, model.attention.n_heads) == (48, "mha", 8)
    assert compose_config(["model/attention=of/colleague"]).model.attention.n_heads == 4


def test_folder_that_is_included_is_known_to_child_processes_and_a_missing_one_is_none(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    write()
    (tmp_path / "conf" / "preset").mkdir(parents=True)
    (tmp_path / "conf" / "preset" / "beside.yaml").write_text(SMALL)
    presets.include(tmp_path / "conf" / "preset")
    presets.include(tmp_path / "nowhere")
    assert os.environ[presets.VARIABLE] == f"{tmp_path}/mine{os.pathsep}{tmp_path}/conf/preset"
    assert "beside" in presets.names()


def test_folder_named_twice_is_no_clash(write: Callable[..., Path]) -> None:
    presets.include(write(colleague=SMALL))
    assert presets.find("colleague").owner == "you"


def test_package_of_a_plugin_holds_presets(
    offered: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_of_presets" / "models").mkdir(parents=True)
    (tmp_path / "package_of_presets" / "models" / "packaged.yaml").write_text(SMALL)
    monkeypatch.syspath_prepend(str(tmp_path))
    offered(packaged="package_of_presets.models")
    assert presets.find("packaged").owner == "package_of_presets.models"
    assert preset("packaged")["d_model"] == 48


def test_plugin_without_its_folder_warns_and_the_others_are_there(offered: Callable[..., None]) -> None:
    offered(ghost="a_missing_package.presets", module="json.decoder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "gpt2" in presets.names()
    told = sorted(str(w.message) for w in caught)
    assert len(told) == 2 and "no such package" in told[0] and "not a package" in told[1]


def test_one_name_of_two_owners_is_refused_with_both(write: Callable[..., Path]) -> None:
    write(gpt2=SMALL, other=SMALL)
    for use in (lambda: preset("gpt2"), lambda: compose_config(["model=gpt2"])):
        with pytest.raises(ConfigError) as caught:
            use()
        assert caught.value.value == "gpt2"
        assert "of blockwright (" in caught.value.rule and " and you (" in caught.value.rule
    assert preset("other")["d_model"] == 48  # the others can be used


@pytest.mark.parametrize("name", sorted(presets.RESERVED))
def test_name_that_model_has_for_something_else_is_refused(write: Callable[..., Path], name: str) -> None:
    write(**{name: SMALL})
    with pytest.raises(ConfigError, match=f"model={name} is blockwright's own"):
        presets.names()


def test_folder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(presets.VARIABLE, "/no/such/folder")
    with pytest.raises(ConfigError, match=r"BLOCKWRIGHT_PRESETS.*no such folder"):
        presets.names()


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no such preset\. Did you mean 'deepseek_v2'"):
        preset("deepsek_v2")


# --- what they inherit ------------------------------------------------------------------------------------------------


def test_node_without_a_name_patches_what_is_inherited_and_one_with_a_name_replaces_it() -> None:
    patched, replaced = preset("llama2_13b"), preset("llama2_70b")
    assert patched["attention"] == {"name": "mha", "n_heads": 40} and patched["norm"]["eps"] == 1e-5
    assert replaced["attention"] == {"name": "gqa", "n_heads": 64, "n_kv_heads": 8}
    assert "inherits" not in patched and patched["vocab_size"] == 32000


def test_changes_of_preset_patch_likewise_and_leave_the_preset_alone() -> None:
    changed = preset("deepseek_v2_lite", {"n_layers": 2, "attention": {"n_heads": 4}, "position": "rope"})
    assert (changed["n_layers"], changed["attention"]["n_heads"], changed["attention"]["kv_lora_rank"]) == (2, 4, 512)
    changed["ffn"]["shared"]["d_ff"] = 1
    assert preset("deepseek_v2_lite")["ffn"]["shared"]["d_ff"] == 2816


def test_parent_that_is_not_there_is_refused_with_the_file_that_names_it(write: Callable[..., Path]) -> None:
    write(bad="inherits: tinny\n")
    with pytest.raises(ConfigError, match=r"no such preset \(preset bad, .*bad\.yaml\)") as caught:
        preset("bad")
    assert (caught.value.path, caught.value.value) == ("model.inherits", "tinny")


def test_null_takes_an_inherited_block_away(write: Callable[..., Path]) -> None:
    write(bare="inherits: qwen3_8b\nqk_norm: null\n")
    assert "qk_norm" not in check(preset("bare"))
    assert "qk_norm" not in compose_config(["model=bare"]).model


def test_any_composition_may_inherit(tmp_path: Path) -> None:
    text = f"inherits: llama2_7b\n{SMALL}"
    changes = {"vocab_size": 61, "d_model": 48, "n_layers": 2, "attention": {"n_heads": 4}}
    assert check(text) == check(preset("llama2_7b", changes))
    (tmp_path / "model.yaml").write_text(text)
    model = composition_of({"file": tmp_path / "model.yaml", "attention": {"n_heads": 2}})
    assert check(model)["attention"] == {"name": "mha", "n_heads": 2}


def test_circle_is_refused_with_its_members(write: Callable[..., Path]) -> None:
    write(one="inherits: two\n", two="inherits: one\n")
    with pytest.raises(ConfigError, match="inherits itself \\(one → two → one\\)"):
        preset("one")


@pytest.mark.parametrize("parent", ["../../../etc/passwd", "../mine/other", "[a]", "3"])
def test_inherits_names_a_preset_and_no_file(write: Callable[..., Path], parent: str) -> None:
    write(heir=f"inherits: {parent}\n", other=SMALL)
    with pytest.raises(ConfigError):
        preset("heir")


# --- untrusted -------------------------------------------------------------------------------------------------------

STRANGE = {
    "a class by its path": ("attention: {_target_: os.system, command: touch ran}\n", "registered blocks only"),
    "the environment": ("d_model: ${oc.env:HOME}\n", "may not contain"),
    "a defaults list": ("defaults: [gpt2]\n", "no defaults list"),
    "broken": ("d_model: {64\n", "cannot be read as YAML"),
    "must hold a mapping": ("- 1\n", "must be a mapping"),
    "an alias bomb": ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)
    ), "expands to more than"),
    "too long": (f"# {'x' * MAX_BYTES}\nd_model: 8\n", "is longer than"),
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE)
def test_what_a_preset_may_not_hold_is_refused_with_its_file(write: Callable[..., Path], what: str) -> None:
    text, rule = STRANGE[what]
    folder = write(untrusted=text)
    with pytest.raises(ConfigError) as caught:
        preset("untrusted")
    assert rule in caught.value.rule and str(folder / "untrusted.yaml") in f"{caught.value.rule}{caught.value.value}"


@pytest.mark.parametrize(("node", "path"), [("{name: mla, n_haeds: 2}", "model.attention.n_haeds")])
def test_wrong_parameter_in_a_preset_is_refused_by_its_path(write: Callable[..., Path], node: str, path: str) -> None:
    write(wrong=f"inherits: tiny\nattention: {node}\n")
    with pytest.raises(ConfigError) as caught:
        compose_config(["model=wrong"])
    assert caught.value.path == path
    assert compose_config(["model=wrong", "model/attention=gqa"]).model.attention.name == "gqa"


def test_unknown_key_of_a_preset_is_refused(write: Callable[..., Path]) -> None:
    write(wrong="inherits: tiny\natention: mla\n")
    with pytest.raises(ConfigError, match=r"model\.atention = 'mla'.*Did you mean 'attention'"):
        check(compose_config(["model=wrong"]).model)
