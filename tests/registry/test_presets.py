"""Presets: where they are found, what they inherit, and that an untrusted one is no more than data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from blockwright.blocks.compose import check, preset
from blockwright.registry import ConfigError, plugins, presets, user_conf
from blockwright.registry.limits import MAX_BYTES
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of

SMALL = "vocab_size: 61\nd_model: 48\nn_layers: 2\nattention: {n_heads: 4}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts presets into a folder of the user."""

    def put(folder: str = "mine", **texts: str) -> Path:
        directory = tmp_path / folder / "preset"
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / f"{name}.yaml").write_text(text)
        known = os.environ.get(user_conf.VARIABLE, "").split(os.pathsep)
        named = dict.fromkeys([*filter(None, known), str(tmp_path / folder)])
        monkeypatch.setenv(user_conf.VARIABLE, os.pathsep.join(named))
        return directory

    monkeypatch.delenv(user_conf.VARIABLE, raising=False)
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
    write(colleague=f"# A small one.\ninherits: llama2_7b\n{SMALL}", bare="inherits: qwen3_8b\nqk_norm: null\n")
    assert "colleague" in presets.names() and presets.find("colleague").summary == "A small one."
    assert preset("colleague")["attention"] == {"name": "mha", "n_heads": 4}
    model = compose_config(["model=colleague", "model.attention.n_heads=8"]).model
    assert (model.d_model, model.attention.name, model.attention.n_heads) == (48, "mha", 8)
    assert compose_config(["model/attention=of/colleague"]).model.attention.n_heads == 4
    assert "qk_norm" not in check(preset("bare")) and "qk_norm" not in compose_config(["model=bare"]).model
    write("conf", beside=SMALL)
    assert "beside" in presets.names() and presets.find("colleague").owner == "you"


def test_package_of_a_plugin_holds_presets_and_one_without_a_folder_warns(
    offered: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "package_of_presets" / "models").mkdir(parents=True)
    (tmp_path / "package_of_presets" / "models" / "packaged.yaml").write_text(SMALL)
    monkeypatch.syspath_prepend(str(tmp_path))
    offered(packaged="package_of_presets.models", ghost="a_missing_package.presets", module="json.decoder")
    with pytest.warns(UserWarning) as caught:
        assert "gpt2" in presets.names()
    assert len(caught) == 2 and presets.find("packaged").owner == "package_of_presets.models"
    assert preset("packaged")["d_model"] == 48


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
    with pytest.raises(ConfigError, match=f"model={name}"):
        presets.names()


def test_folder_or_name_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'deepseek_v2'"):  # the nearest
        preset("deepsek_v2")
    monkeypatch.setenv(user_conf.VARIABLE, "/no/such/folder")
    with pytest.raises(ConfigError, match="BLOCKWRIGHT_CONF"):
        presets.names()


# --- what they inherit ------------------------------------------------------------------------------------------------


def test_node_without_a_name_patches_what_is_inherited_and_one_with_a_name_replaces_it() -> None:
    patched, replaced = preset("llama2_13b"), preset("llama2_70b")
    assert patched["attention"] == {"name": "mha", "n_heads": 40} and patched["norm"]["eps"] == 1e-5
    assert replaced["attention"] == {"name": "gqa", "n_heads": 64, "n_kv_heads": 8}
    assert "inherits" not in patched and patched["vocab_size"] == 32000
    changed = preset("deepseek_v2_lite", {"n_layers": 2, "attention": {"n_heads": 4}, "position": "rope"})
    assert (changed["n_layers"], changed["attention"]["n_heads"], changed["attention"]["kv_lora_rank"]) == (2, 4, 512)
    changed["ffn"]["shared"]["d_ff"] = 1
    assert preset("deepseek_v2_lite")["ffn"]["shared"]["d_ff"] == 2816


def test_any_composition_may_inherit(tmp_path: Path) -> None:
    text = f"inherits: llama2_7b\n{SMALL}"
    changes = {"vocab_size": 61, "d_model": 48, "n_layers": 2, "attention": {"n_heads": 4}}
    assert check(text) == check(preset("llama2_7b", changes))
    (tmp_path / "model.yaml").write_text(text)
    model = composition_of({"file": tmp_path / "model.yaml", "attention": {"n_heads": 2}})
    assert check(model)["attention"] == {"name": "mha", "n_heads": 2}


def test_circle_or_unknown_parent_is_refused_with_its_file(write: Callable[..., Path]) -> None:
    write(one="inherits: two\n", two="inherits: one\n", bad="inherits: tinny\n", other=SMALL)
    for name, named in (("one", "one → two → one"), ("bad", r"bad\.yaml")):
        with pytest.raises(ConfigError, match=named) as caught:
            preset(name)
        assert caught.value.path == "model.inherits"
    for parent in ("../../../etc/passwd", "../mine/other", "[a]", "3"):  # it names a preset, and no file
        write(heir=f"inherits: {parent}\n")
        with pytest.raises(ConfigError):
            preset("heir")


# --- untrusted -------------------------------------------------------------------------------------------------------

BOMB = "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True))
STRANGE = {
    "a class by its path": "attention: {_target_: os.system, command: touch ran}\n",
    "the environment": "d_model: ${oc.env:HOME}\n",
    "a defaults list": "defaults: [gpt2]\n",
    "broken": "d_model: {64\n",
    "no mapping": "- 1\n",
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + BOMB,
    "too long": f"# {'x' * MAX_BYTES}\nd_model: 8\n",
}


def test_what_a_preset_may_not_hold_is_refused_with_its_file(write: Callable[..., Path]) -> None:
    for what, text in STRANGE.items():
        folder = write(untrusted=text)
        with pytest.raises(ConfigError) as caught:
            preset("untrusted")
        assert str(folder / "untrusted.yaml") in f"{caught.value.rule}{caught.value.value}", what


def test_wrong_parameter_in_a_preset_is_refused_by_its_path(write: Callable[..., Path]) -> None:
    write(wrong="inherits: tiny\nattention: {name: mla, n_haeds: 2}\n", key="inherits: tiny\natention: mla\n")
    with pytest.raises(ConfigError) as caught:
        compose_config(["model=wrong"])
    assert caught.value.path == "model.attention.n_haeds"
    assert compose_config(["model=wrong", "model/attention=gqa"]).model.attention.name == "gqa"
    with pytest.raises(ConfigError) as caught:
        check(compose_config(["model=key"]).model)
    assert caught.value.path == "model.atention"
